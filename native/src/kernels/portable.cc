// Whatever the compiler's baseline is: 16-byte vectors, which x86-64 and aarch64 both have.
#include "kernels/table_of.h"
#include "kernels/tables.h"
#include "quant/pack.h"

namespace edgert {
namespace {

struct Portable : VectorOps<Portable, 4> {
  static constexpr int kRegisters = 16;
  using VectorOps::load;
  using Short = VectorOf<std::int16_t, 8>::type;
  using Long = VectorOf<std::int64_t, 2>::type;
  using Byte = VectorOf<std::uint8_t, 16>::type;

  static Float madd(Float a, Float b, Float c) { return a * b + c; }
  // Little-endian: low halves interleaved with zeros, in the patterns that are one instruction.
  static Bits widen_low(Short v) {
    return (Bits)__builtin_shufflevector(v, Short{}, 0, 8, 1, 9, 2, 10, 3, 11);
  }
  static Bits load_u16(const void* p) { return widen_low((Short)Long{load_raw<std::int64_t>(p), 0}); }
  static Int load_u8(const void* p) {
    const auto bytes = (Byte)Int{load_raw<std::int32_t>(p), 0, 0, 0};
    return (Int)widen_low((Short)__builtin_shufflevector(bytes, Byte{}, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5,
                                                         21, 6, 22, 7, 23));
  }
  static Int load_i8(const void* p) { return (Int)((Bits)load_u8(p) << 24) >> 24; }
  static Bits lookup(Bits table, Bits codes) {
    const auto values = (Byte)table, indices = (Byte)codes;
    Byte found{};
    for (int i = 0; i < 16; ++i) found[i] = values[indices[i]];
    return (Bits)found;
  }
  // A half's bits in a float's places are 2^112 too small, subnormal ones as well; Inf and NaN need the
  // exponent.
  static Float load(const Half* p) {
    const Int placed = ((Int)(load_u16(p) << 16) >> 3) & std::int32_t(0x8fffe000);
    const Int special = ((placed & 0x0f800000) == 0x0f800000) & 0x7f800000;
    return (Float)((Int)((Float)placed * 0x1p112f) | special);
  }
  static void store_half(Half* p, Float v) {
    for (int i = 0; i < kWidth; ++i) p[i].bits = float_to_half(v[i]);
  }

  // Even and odd bytes as 16-bit products.
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
