// AVX-512 F/BW/DQ/VL and VNNI.
#include <immintrin.h>

#include "kernels/table_of.h"
#include "kernels/tables.h"

namespace edgert {
namespace {

struct Avx512 : VectorOps<Avx512, 16> {
  static constexpr int kRegisters = 32;
  using VectorOps::load;

  static Float madd(Float a, Float b, Float c) {
    return (Float)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  }
  // Masked forms, all lanes set: gcc 12 takes the plain ones for reads of uninitialised registers.
  static Float load(const Half* p) { return (Float)_mm512_maskz_cvtph_ps(0xffff, load_raw<__m256i>(p)); }
  static void store_half(Half* p, Float v) {
    const __m256i half = _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
    __builtin_memcpy(p, &half, sizeof half);
  }

  using Narrow = Int;
  static Int dot_narrow(Int sum, Bits codes, Bits x) {
    return (Int)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)x);
  }
  static Int widen(Int sum) { return sum; }

  static constexpr int kInt8Zero = 128;
  static Int dot_int8(Int sum, Bits codes, Bits x) { return dot_narrow(sum, codes, x); }
};

}  // namespace

constinit const KernelTable avx512_table = table_of<Avx512>("avx512");

}  // namespace edgert
