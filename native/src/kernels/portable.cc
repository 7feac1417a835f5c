// Whatever the compiler's baseline is: 16-byte vectors, which x86-64 and aarch64 both have.
#include "kernels/table_of.h"
#include "kernels/tables.h"
#include "quant/pack.h"

namespace edgert {
namespace {

struct Portable : VectorOps<Portable, 4> {
  static constexpr int kRegisters = 16;
  using VectorOps::load;
  typedef std::int16_t Short __attribute__((vector_size(16)));

  static Float madd(Float a, Float b, Float c) { return a * b + c; }
  static Float load(const Half* p) {
    const Bits half = __builtin_convertvector(load_raw<Bits16>(p), Bits);
    const Bits sign = (half & 0x8000u) << 16, magnitude = (half & 0x7fffu) << 13;
    const Bits normal = magnitude + (112u << 23);
    const auto subnormal = (Bits)((Float)(magnitude + (113u << 23)) - 0x1p-14f);
    const Bits special = magnitude | 0x7f800000u;  // Inf and NaN
    return (Float)(sign | (magnitude < (1u << 23) ? subnormal : magnitude < (31u << 23) ? normal : special));
  }
  static void store_half(Half* p, Float v) {
    for (int i = 0; i < kWidth; ++i) p[i].bits = float_to_half(v[i]);
  }

  // Even and odd bytes as 16-bit products; 8 steps of 2 reach 8 * 2 * 15 * 127 = 30480 at most.
  using Narrow = Short;
  static Short pairs(Short even_codes, Short odd_codes, Bits x) {
    const auto both = (Short)x;
    const auto even = (Short)((Bits)both << 8) >> 8;
    return even_codes * even + odd_codes * (both >> 8);
  }
  static Narrow dot_narrow(Narrow sum, Bits codes, Bits x) {
    return sum + pairs((Short)(codes & 0x00ff00ffu), (Short)((codes >> 8) & 0x00ff00ffu), x);
  }
  static Int widen(Narrow sum) { return ((Int)((Bits)sum << 16) >> 16) + ((Int)sum >> 16); }

  // Centred codes, because 255 * 127 * 2 would not fit 16 bits, and 128 * 127 * 2 does.
  static constexpr int kInt8Zero = 0;
  static Int dot_int8(Int sum, Bits codes, Bits x) {
    const auto even = (Short)(codes & 0x00ff00ffu), odd = (Short)((codes >> 8) & 0x00ff00ffu);
    return sum + widen(pairs(even - std::int16_t{128}, odd - std::int16_t{128}, x));
  }
};

}  // namespace

constinit const KernelTable portable_table = table_of<Portable>("portable");

}  // namespace edgert
