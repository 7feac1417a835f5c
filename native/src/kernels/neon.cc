// AArch64 with the dot-product extension.
#include <arm_neon.h>

#include "kernels/table_of.h"
#include "kernels/tables.h"

namespace edgert {
namespace {

struct Neon : VectorOps<Neon, 4> {
  static constexpr int kRegisters = 32;
  using VectorOps::load;

  static Float madd(Float a, Float b, Float c) {
    return (Float)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  }
  static Float load(const Half* p) { return (Float)vcvt_f32_f16(load_raw<float16x4_t>(p)); }
  static void store_half(Half* p, Float v) {
    const float16x4_t half = vcvt_f16_f32((float32x4_t)v);
    __builtin_memcpy(p, &half, sizeof half);
  }

  using Narrow = Int;
  static Int dot_narrow(Int sum, Bits codes, Bits x) {
    return (Int)vdotq_s32((int32x4_t)sum, (int8x16_t)codes, (int8x16_t)x);
  }
  static Int widen(Int sum) { return sum; }

  static constexpr int kInt8Zero = 0;  // sdot takes signed bytes: centred codes
  static Int dot_int8(Int sum, Bits codes, Bits x) { return dot_narrow(sum, codes ^ 0x80808080u, x); }
};

}  // namespace

constinit const KernelTable neon_table = table_of<Neon>("neon");

}  // namespace edgert
