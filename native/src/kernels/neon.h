// What the AArch64 tables share: 16-byte vectors with the dot-product extension (`sdot`).
//
// A vector of codes is 4 rows by 4 columns. The activations of 16 columns are loaded as one vector, of which
// four steps take a lane each.
#pragma once

#include <arm_neon.h>

#include <bit>
#include <utility>

#include "kernels/table_of.h"
#include "kernels/tables.h"

namespace edgert {
namespace {

// Calls body(Count<0>), ... body(Count<N - 1>): lanes and shifts have to be constants.
template <int N, class Body>
[[gnu::always_inline]] inline void unrolled(Body&& body) {
  [&]<int... I>(std::integer_sequence<int, I...>)
      __attribute__((always_inline)) { (body(Count<I>{}), ...); }(std::make_integer_sequence<int, N>{});
}

struct Neon : VectorOps<Neon, 4> {
  static constexpr int kRegisters = 32;
  static constexpr bool kOwnIntegerTiles = true;
  using VectorOps::load;

  static Float madd(Float a, Float b, Float c) {
    return (Float)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  }
  static Float load(const Half* p) { return (Float)vcvt_f32_f16(load_raw<float16x4_t>(p)); }
  static Bits load_u16(const void* p) { return (Bits)vmovl_u16(load_raw<uint16x4_t>(p)); }
  static Int load_u8(const void* p) {
    const auto bytes = vcreate_u8(load_raw<std::uint32_t>(p));
    return (Int)vmovl_u16(vget_low_u16(vmovl_u8(bytes)));
  }
  static void store_half(Half* p, Float v) {
    const float16x4_t half = vcvt_f16_f32((float32x4_t)v);
    __builtin_memcpy(p, &half, sizeof half);
  }
  static Int dot_peak(Int sum, Bits codes, Bits x) {
    return (Int)vdotq_s32((int32x4_t)sum, (int8x16_t)codes, (int8x16_t)x);
  }

  static Int load_i8(const void* p) {
    const auto bytes = vreinterpret_s8_u8(vcreate_u8(load_raw<std::uint32_t>(p)));
    return (Int)vmovl_s16(vget_low_s16(vmovl_s8(bytes)));
  }

  // One step's codes of a strip; their upper bits are whatever the plane holds where `masked` is false.
  template <int Bits, int Step, bool masked = true>
  [[gnu::always_inline]] static uint8x16_t unpack(const IntegerTile& tile, std::size_t group, int strip) {
    constexpr int kPlane = static_cast<int>(std::bit_floor(static_cast<unsigned>(Bits)));
    if constexpr (kPlane != Bits) {
      IntegerTile high_plane = tile;
      high_plane.codes += tile.padded * kTileRows * kPlane / 8;
      const auto low = unpack<kPlane, Step, false>(tile, group, strip),
                 high = unpack<Bits - kPlane, Step>(high_plane, group, strip);
      return vsliq_n_u8(low, high, kPlane);
    } else {
      constexpr int kStepsAVector = 8 / Bits, kShift = Bits * (Step % kStepsAVector);
      const std::byte* p = tile.codes + group * (kActivationGroup * kTileRows * Bits / 8) + strip * 16;
      const auto v = load_raw<uint8x16_t>(p + Step / kStepsAVector * 64) >> kShift;
      return masked && kShift + Bits < 8 ? v & std::uint8_t{(1 << Bits) - 1} : v;
    }
  }

  // The same as products want them: codes, or a codebook's values with an offset.
  template <Kind K, int Step, int Offset>
  [[gnu::always_inline]] static uint8x16_t step_codes(const IntegerTile& tile, std::size_t group, int strip) {
    const uint8x16_t codes = unpack<K.bits, Step>(tile, group, strip);
    if constexpr (K.codebook == Codebook::none) {
      return codes;
    } else {
      return vqtbl1q_u8(load_raw<uint8x16_t>(kCodebookTable<K.codebook, Offset>.data()), codes);
    }
  }

  // The zero that is left for `sum` to take, after the codes have lost `centre`.
  template <Kind K>
  [[gnu::always_inline]] static int32x4_t zeros(const IntegerTile& tile, std::size_t lane, int centre) {
    if constexpr (K.zero == ZeroType::u8) {
      return (int32x4_t)(tile.zeros ? load_u8(tile.zeros + lane) : splat(1 << (K.bits - 1))) - centre;
    } else {
      return vdupq_n_s32(K.zero_code() - centre);
    }
  }

  template <Kind K>
  static constexpr int row_block() {
    return K.halves == 2 ? 4 : 8;
  }

  template <Kind K, int M, int T>
  static void integer_tiles(const IntegerTile (&tiles)[T], bool first, const QuantizedRow (&x)[M],
                            Float (&result)[T][M][kStrips]) {
    constexpr int kBlock = M >= 4 ? 2 : 4;  // strips: registers for sums and activations
    // sdot takes signed bytes: codes of 8 bits lose 128, and values of codebooks are taken as they are.
    constexpr bool kIsCodebook = K.codebook != Codebook::none;
    constexpr std::uint8_t kCentre = K.bits == 8 ? 128 : 0;
    constexpr int kTaken = kIsCodebook ? K.zero_code() : kCentre;
    const std::size_t groups = tiles[0].padded / kActivationGroup;
    __builtin_memset(result, 0, sizeof result);
    Prefetch<K.bits, M, T> prefetch[T];
    for (int t = 0; t < T; ++t) prefetch[t] = Prefetch<K.bits, M, T>(tiles[t]);
    for (std::size_t g = 0; g < groups; ++g) {
      const std::size_t block = tiles[0].lane_of_block(g);
      for (int t = 0; t < T; ++t) {
        const IntegerTile& tile = tiles[t];
        if (first) prefetch[t](g);
        for (int strip = 0; strip < kStrips; strip += kBlock) {
          const std::size_t lane = block + static_cast<std::size_t>(strip * kWidth);
          int32x4_t dots[kBlock][M];  // from -zero * sum on, so that nothing is left to subtract
          Int sums[kBlock][M];        // of the halves
          unrolled<2>([&]<int Half>(Count<Half>) __attribute__((always_inline)) {
            if constexpr (Half == 0 || K.halves == 2) {
              for (int s = 0; s < kBlock; ++s) {
                const auto zero = zeros<K>(tile, lane + static_cast<std::size_t>(s * kWidth), kTaken);
                for (int r = 0; r < M; ++r) dots[s][r] = vmulq_n_s32(zero, -x[r].sum(g, Half, K.halves));
              }
            }
            int8x16_t columns[M];
            for (int r = 0; r < M; ++r) columns[r] = vld1q_s8(x[r].codes + g * kActivationGroup + Half * 16);
            unrolled<4>([&]<int Step>(Count<Step>) __attribute__((always_inline)) {
              for (int s = 0; s < kBlock; ++s) {
                const auto codes =
                    (int8x16_t)(step_codes<K, Half * 4 + Step, 0>(tile, g, strip + s) ^ kCentre);
                for (int r = 0; r < M; ++r) dots[s][r] = vdotq_laneq_s32(dots[s][r], codes, columns[r], Step);
              }
            });
            if constexpr (Half == 1 || K.halves == 2) {
              constexpr int kHalf = K.halves == 2 ? Half : 0;
              for (int s = 0; s < kBlock; ++s) {
                const GroupTerms<Neon, K> terms(tile, g, block, strip + s);
                for (int r = 0; r < M; ++r) {
                  Int dot = terms.scaled((Int)dots[s][r], kHalf);
                  if (kHalf == 1) dot += sums[s][r];
                  if (Half == 1) {
                    result[t][r][strip + s] += terms.term(dot, x[r], g);
                  } else {
                    sums[s][r] = dot;
                  }
                }
              }
            }
          });
        }
      }
    }
  }
};

}  // namespace
}  // namespace edgert
