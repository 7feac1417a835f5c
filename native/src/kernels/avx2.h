// What the tables of 32-byte vectors share: AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include "kernels/table_of.h"
#include "kernels/tables.h"

namespace edgert {
namespace {

struct Avx2 : VectorOps<Avx2, 8> {
  static constexpr int kRegisters = 16;
  static constexpr int kRowBlock = 4, kTileBlock = 2;
  using VectorOps::load;

  static Float madd(Float a, Float b, Float c) {
    return (Float)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  }
  static Float load(const Half* p) { return (Float)_mm256_cvtph_ps(load_raw<__m128i>(p)); }
  static Int load_u8(const void* p) { return (Int)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
  static Int load_i8(const void* p) { return (Int)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
  static Bits lookup(Bits table, Bits codes) {
    return (Bits)_mm256_shuffle_epi8((__m256i)table, (__m256i)codes);
  }
  static Bits load_u16(const void* p) { return (Bits)_mm256_cvtepu16_epi32(load_raw<__m128i>(p)); }
  static void store_half(Half* p, Float v) {
    const __m128i half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
    __builtin_memcpy(p, &half, sizeof half);
  }

  // Step by step: gcc would add as a tree or gather operands first, for which 16 registers are too few.
  template <class T>
  [[gnu::always_inline]] static T in_order(T sum) {
    asm("" : "+x"(sum));
    return sum;
  }

  using Narrow = __m256i;
  static Narrow dot_narrow(Narrow sum, Bits codes, Bits x) {
    return in_order(_mm256_add_epi16(sum, _mm256_maddubs_epi16((__m256i)codes, (__m256i)x)));
  }
  static Int mul16(Int a, Int b) { return (Int)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
  static Int widen(Narrow sum) { return (Int)_mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }

  // maddubs would saturate on 255 * 127 * 2. The magnitude of a centred code is at most 128, and 128 * 127 *
  // 2 fits; its sign moves to the activation.
  static constexpr int kInt8Zero = 0;
  static Int dot_int8(Int sum, Bits codes, Bits x) {
    const auto centred = (__m256i)(codes ^ 0x80808080u);
    const __m256i pairs =
        _mm256_maddubs_epi16(_mm256_abs_epi8(centred), _mm256_sign_epi8((__m256i)x, centred));
    return in_order(sum + widen(pairs));
  }
  static Int dot_peak(Int sum, Bits codes, Bits x) { return (Int)dot_narrow((Narrow)sum, codes, x); }
};

}  // namespace
}  // namespace edgert
