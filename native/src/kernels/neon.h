// What the AArch64 tables share: 16-byte vectors with the dot-product extension (`sdot`).
//
// A vector of codes is 4 rows by 4 columns. The activations of 16 columns are loaded as one vector, of which
// four steps take a lane each.
#pragma once

#include <arm_neon.h>

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
  static constexpr int kRowBlock = 8;
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

  // One step's codes of a strip; their upper bits are whatever the plane holds where `masked` is false.
  template <int Bits, int Step, bool masked = true>
  [[gnu::always_inline]] static uint8x16_t unpack(const IntegerTile& tile, std::size_t group, int strip) {
    if constexpr (Bits == 3) {
      IntegerTile high_plane = tile;
      high_plane.codes += tile.padded * kTileRows * 2 / 8;
      const auto low = unpack<2, Step, false>(tile, group, strip),
                 high = unpack<1, Step>(high_plane, group, strip);
      return vsliq_n_u8(low, high, 2);
    } else {
      constexpr int kStepsAVector = 8 / Bits, kShift = Bits * (Step % kStepsAVector);
      const std::byte* p = tile.codes + group * (kActivationGroup * kTileRows * Bits / 8) + strip * 16;
      const auto v = load_raw<uint8x16_t>(p + Step / kStepsAVector * 64) >> kShift;
      return masked && kShift + Bits < 8 ? v & std::uint8_t{(1 << Bits) - 1} : v;
    }
  }

  // The zeros of a strip. Where the format has none, zero is 2^(Bits - 1) less `centre`, by which codes are
  // centred.
  template <int Bits>
  [[gnu::always_inline]] static int32x4_t zeros(const IntegerTile& tile, std::size_t lane, int centre) {
    return (int32x4_t)(tile.zeros ? load_u8(tile.zeros + lane) : splat(1 << (Bits - 1))) - centre;
  }

  template <int Bits, int M, int T>
  static void integer_tiles(const IntegerTile (&tiles)[T], bool first, const QuantizedRow (&x)[M],
                            Float (&result)[T][M][kStrips]) {
    constexpr int kBlock = M >= 4 ? 2 : 4;                 // strips: registers for sums and activations
    constexpr std::uint8_t kCentre = Bits == 8 ? 128 : 0;  // sdot takes signed bytes
    const std::size_t groups = tiles[0].padded / kActivationGroup;
    __builtin_memset(result, 0, sizeof result);
    Prefetch<Bits, M, T> prefetch[T];
    for (int t = 0; t < T; ++t) prefetch[t] = Prefetch<Bits, M, T>(tiles[t]);
    for (std::size_t g = 0; g < groups; ++g) {
      const std::size_t row_of_scales = tiles[0].scales_of(g);
      for (int t = 0; t < T; ++t) {
        const IntegerTile& tile = tiles[t];
        if (first) prefetch[t](g);
        for (int strip = 0; strip < kStrips; strip += kBlock) {
          const std::size_t lane = row_of_scales + static_cast<std::size_t>(strip * kWidth);
          int32x4_t dots[kBlock][M];  // from -zero * sum on, so that nothing is left to subtract
          for (int s = 0; s < kBlock; ++s) {
            const auto zero = zeros<Bits>(tile, lane + static_cast<std::size_t>(s * kWidth), kCentre);
            for (int r = 0; r < M; ++r) dots[s][r] = vmulq_n_s32(zero, -x[r].sums[g]);
          }
          unrolled<2>([&]<int Half>(Count<Half>) __attribute__((always_inline)) {
            int8x16_t columns[M];
            for (int r = 0; r < M; ++r) columns[r] = vld1q_s8(x[r].codes + g * kActivationGroup + Half * 16);
            unrolled<4>([&]<int Step>(Count<Step>) __attribute__((always_inline)) {
              for (int s = 0; s < kBlock; ++s) {
                const auto codes = (int8x16_t)(unpack<Bits, Half * 4 + Step>(tile, g, strip + s) ^ kCentre);
                for (int r = 0; r < M; ++r) dots[s][r] = vdotq_laneq_s32(dots[s][r], codes, columns[r], Step);
              }
            });
          });
          for (int s = 0; s < kBlock; ++s) {
            const Float scale = load(tile.scales + lane + s * kWidth);
            for (int r = 0; r < M; ++r) {
              result[t][r][strip + s] += (scale * splat(x[r].scales[g])) * to_float((Int)dots[s][r]);
            }
          }
        }
      }
    }
  }
};

}  // namespace
}  // namespace edgert
