// What every instruction set shares: vectors of `Width` lanes written with the compiler's vector extension.
//
// A kernel is a template over a class V : VectorOps<V, Width> that lives in the unnamed namespace of its
// translation unit, so nothing compiled with that unit's flags can be linked into another's code. V adds
//
//   kRegisters                      vector registers to block for
//   kRowBlock, kTileBlock           activation rows and tiles that an integer product takes together
//   madd(a, b, c)                   a * b + c, fused where the instruction set fuses
//   load(const Half*), store_half   f16 to f32 and back, nearest even
//   load_u8, load_i8, load_u16      integers to Int, Int and Bits
//   lookup(table, codes)            table[code] for bytes: codes up to 15, and the 16 values over and over
//   Narrow, dot_narrow, widen       4-way dot products u8 x s8: dot_narrow adds to every lane and widen gives
//   the
//                                   sums as Int; where Narrow is not Int, 16 bits have to hold the sum of two
//                                   products
//   mul16                           a * b for 0 <= a < 2^15, |b| < 2^15, where that is cheaper
//   kInt8Zero, dot_int8             the same for codes up to 255, of which 128 - kInt8Zero is taken first
//   integer_tiles, row_block        instead of the last four rows, where kOwnIntegerTiles: as those of
//   matmul.h dot_peak, kPeakProducts         what multiplies most bytes, and how many; dot_int8 where not
//   given
//
// 16 lanes are kStrips vectors. Everything here has the same result on every instruction set, but for madd.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "quant/format.h"

namespace edgert {

struct Half {
  std::uint16_t bits;
};
struct Bfloat {
  std::uint16_t bits;
};

// Into the second-level cache.
inline void prefetch(const std::byte* from, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

template <class T, int Width>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * Width)));
};

template <class V, int Width>
struct VectorOps {
  static constexpr int kWidth = Width;
  static constexpr int kStrips = kTileRows / Width;
  static constexpr int kRowBlock = 4, kTileBlock = 1;
  static constexpr bool kOwnIntegerTiles = false;
  static constexpr int kPeakProducts = 4 * Width;
  using Float = typename VectorOf<float, Width>::type;
  using Int = typename VectorOf<std::int32_t, Width>::type;
  using Bits = typename VectorOf<std::uint32_t, Width>::type;

  template <class T>
  static T load_raw(const void* p) {
    T v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static Float load(const float* p) { return load_raw<Float>(p); }
  static Float load(const Bfloat* p) { return (Float)(V::load_u16(p) << 16); }
  static void store(float* p, Float v) { __builtin_memcpy(p, &v, sizeof v); }

  // The first `lanes` lanes (none where it is negative); the others are `fill`.
  static Float load_partial(const float* p, std::ptrdiff_t lanes, float fill) {
    if (lanes >= Width) return load(p);
    Float v = splat(fill);
    for (std::ptrdiff_t i = 0; i < lanes; ++i) v[i] = p[i];
    return v;
  }
  static void store_partial(float* p, Float v, std::ptrdiff_t lanes) {
    if (lanes >= Width) return store(p, v);
    for (std::ptrdiff_t i = 0; i < lanes; ++i) p[i] = v[i];
  }

  static Float splat(float value) { return value - Float{}; }
  static Int mul16(Int a, Int b) { return a * b; }
  static Int splat(std::int32_t value) { return value + Int{}; }
  static Bits splat(std::uint32_t value) { return value + Bits{}; }
  static Float to_float(Int v) { return __builtin_convertvector(v, Float); }
  static Float max(Float a, Float b) { return a > b ? a : b; }
  static Float min(Float a, Float b) { return a < b ? a : b; }
  static Float abs(Float v) { return (Float)((Bits)v & 0x7fffffffu); }

  // Nearest even; |v| < 2^22.
  static Int round(Float v) {
    constexpr float magic = 0x1.8p23f;
    return (Int)(v + magic) - __builtin_bit_cast(std::int32_t, magic);
  }

  // About 1 ulp; 0 where the result is below 2^-125, inf where it overflows, NaN for NaN.
  static Float exp(Float x) {
    const Float smallest = splat(-86.6434f), largest = splat(89.0f);  // -125 ln 2, past ln FLT_MAX
    const Float clamped = x < smallest ? smallest : x > largest ? largest : x;
    // exp(x) = 2^n exp(r), |r| <= ln(2) / 2. The high part of ln 2 has few bits: n * high is exact.
    constexpr float magic = 0x1.8p23f;
    const Float shifted = V::madd(clamped, splat(1.44269504f), splat(magic));
    const Float n = shifted - magic;
    const Float r = V::madd(n, splat(2.12194440e-4f), V::madd(n, splat(-0.693359375f), clamped));
    constexpr float kTaylor[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    Float p = splat(1.0f / 5040);  // the next term is below 2^-27
    for (float c : kTaylor) p = V::madd(p, r, splat(c));
    const Bits half_power = ((Bits)shifted - __builtin_bit_cast(std::uint32_t, magic) + 126u)
                            << 23;  // 2^(n-1)
    return x < smallest ? Float{} : p * (Float)half_power * 2.0f;
  }

  static Int dot_peak(Int sum, Bits codes, Bits x) { return V::dot_int8(sum, codes, x); }

  // combine(a, b) over all lanes; in no stated order.
  static std::int32_t fold(Int v, const auto& combine) {
    const auto halve = [&]<int Half, int... I>(std::integral_constant<int, Half>,
                                               std::integer_sequence<int, I...>) {
      v = combine(v, __builtin_shufflevector(v, v, (I ^ Half)...));
    };
    const auto lanes = std::make_integer_sequence<int, Width>();
    if constexpr (Width > 8) halve(std::integral_constant<int, 8>(), lanes);
    if constexpr (Width > 4) halve(std::integral_constant<int, 4>(), lanes);
    halve(std::integral_constant<int, 2>(), lanes);
    halve(std::integral_constant<int, 1>(), lanes);
    return v[0];
  }

  // Over 16 lanes, as a tree.
  static float sum(const Float (&v)[kStrips]) {
    float lanes[kTileRows];
    __builtin_memcpy(lanes, v, sizeof lanes);
    for (int half = kTileRows / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
  }
  static float max(const Float (&v)[kStrips]) {
    float lanes[kTileRows];
    __builtin_memcpy(lanes, v, sizeof lanes);
    for (int i = 1; i < kTileRows; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    return lanes[0];
  }
};

// Calls body(offset, strip, lanes) for every strip of n elements; the last one's `lanes` may be less than a
// strip.
template <class V, class Body>
void for_each_strip(std::size_t n, Body&& body) {
  for (std::size_t i = 0; i < n; i += kTileRows) {
    for (int strip = 0; strip < V::kStrips; ++strip) {
      const std::size_t offset = i + static_cast<std::size_t>(strip * V::kWidth);
      if (offset < n) body(offset, strip, static_cast<std::ptrdiff_t>(n - offset));
    }
  }
}

// Calls body(Count<M>, begin) over n rows in blocks of Max, Max / 2, ... 1.
template <int M>
struct Count {};
template <int Max, class Body>
void for_each_block(std::size_t n, Body&& body, std::size_t begin = 0) {
  for (; begin + Max <= n; begin += Max) body(Count<Max>{}, begin);
  if constexpr (Max > 1) for_each_block<Max / 2>(n, body, begin);
}

}  // namespace edgert
