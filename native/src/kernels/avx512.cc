// AVX-512 F/BW/DQ/VL and VNNI.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12's own header, on _mm512_undefined_ps
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif

#include "kernels/table_of.h"
#include "kernels/tables.h"

namespace edgert {
namespace {

struct Avx512 : VectorOps<Avx512, 16> {
  static constexpr int kRegisters = 32;
  static constexpr int kRowBlock = 8, kTileBlock = 2;
  using VectorOps::load;

  static Float madd(Float a, Float b, Float c) {
    return (Float)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  }
  static Float load(const Half* p) { return (Float)_mm512_cvtph_ps(load_raw<__m256i>(p)); }
  static Int load_u8(const void* p) { return (Int)_mm512_cvtepu8_epi32(load_raw<__m128i>(p)); }
  static Int load_i8(const void* p) { return (Int)_mm512_cvtepi8_epi32(load_raw<__m128i>(p)); }
  static Bits lookup(Bits table, Bits codes) {
    return (Bits)_mm512_shuffle_epi8((__m512i)table, (__m512i)codes);
  }
  static Bits load_u16(const void* p) { return (Bits)_mm512_cvtepu16_epi32(load_raw<__m256i>(p)); }
  static void store_half(Half* p, Float v) {
    const __m256i half = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
    __builtin_memcpy(p, &half, sizeof half);
  }

  using Narrow = Int;
  static Int dot_narrow(Int sum, Bits codes, Bits x) {
    return (Int)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)x);
  }
  static Int mul16(Int a, Int b) { return (Int)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
  static Int widen(Int sum) { return sum; }

  static constexpr int kInt8Zero = 128;
  static Int dot_int8(Int sum, Bits codes, Bits x) { return dot_narrow(sum, codes, x); }
};

}  // namespace

constinit const KernelTable avx512_table = table_of<Avx512>("avx512");

}  // namespace edgert
