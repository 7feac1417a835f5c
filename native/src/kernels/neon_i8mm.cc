// AArch64 with dot products and int8 matrix multiplication: `usmmla` multiplies 2 rows x 8 columns of codes
// by 2 rows x 8 columns of activations.
#include "kernels/neon.h"

namespace edgert {
namespace {

struct NeonI8mm : Neon {
  static constexpr int kTileBlock = 2;
  static constexpr int kPeakProducts = 32;
  static Int dot_peak(Int sum, Bits codes, Bits x) {
    return (Int)vusmmlaq_s32((int32x4_t)sum, (uint8x16_t)codes, (int8x16_t)x);
  }

  // Two activation rows of one group, as matrix products want them: a result vector is two rows of weights
  // (of the pairs {0, 1} and {2, 3} of a strip) times {first, second}.
  struct RowPair {
    int8x16_t columns[kActivationGroup / 8];
    float32x4_t scale;  // {first, second, first, second}
    int32x4_t minus_sum;
  };
  [[gnu::always_inline]] static RowPair row_pair(const QuantizedRow& first, const QuantizedRow& second,
                                                 std::size_t group) {
    RowPair pair;
    for (int half = 0; half < 2; ++half) {
      const std::size_t at = group * kActivationGroup + static_cast<std::size_t>(half * 16);
      const auto a = load_raw<int64x2_t>(first.codes + at), b = load_raw<int64x2_t>(second.codes + at);
      pair.columns[2 * half] = (int8x16_t)vzip1q_s64(a, b);
      pair.columns[2 * half + 1] = (int8x16_t)vzip2q_s64(a, b);
    }
    const float a = first.scales[group], b = second.scales[group];
    pair.scale = float32x4_t{a, b, a, b};
    const std::int32_t c = -first.sums[group].all, d = -second.sums[group].all;
    pair.minus_sum = int32x4_t{c, d, c, d};
    return pair;
  }

  // What matrix products are written for: a scale and a zero, or codebook, for each group of 32 columns or
  // more.
  template <Kind K>
  static constexpr bool kAsMatrices = !K.has_blocks() && !K.has_minima();
  template <Kind K>
  static constexpr int row_block() {
    return kAsMatrices<K> ? 16 : Neon::row_block<K>();
  }

  // A single row stays with dot products, and so do the other formats. The sums of a row pair keep the layout
  // of the products until the end.
  template <Kind K, int M, int T>
  static void integer_tiles(const IntegerTile (&tiles)[T], bool first, const QuantizedRow (&x)[M],
                            Float (&result)[T][M][kStrips]) {
    if constexpr (M == 1 || !kAsMatrices<K>) {
      return Neon::integer_tiles<K, M, T>(tiles, first, x, result);
    } else {
      constexpr int kPairs = M / 2;
      const std::size_t groups = tiles[0].padded / kActivationGroup;
      float32x4_t sums[T][kStrips][2][kPairs] = {};
      Prefetch<K.bits, M, T> prefetch[T];
      for (int t = 0; t < T; ++t) prefetch[t] = Prefetch<K.bits, M, T>(tiles[t]);
      for (std::size_t g = 0; g < groups; ++g) {
        RowPair pairs[kPairs];
        for (int p = 0; p < kPairs; ++p) pairs[p] = row_pair(x[2 * p], x[2 * p + 1], g);
        for (int t = 0; t < T; ++t) {
          if (first) prefetch[t](g);
          add_group<K>(tiles[t], g, pairs, sums[t]);
        }
      }
      for (int t = 0; t < T; ++t) {
        for (int strip = 0; strip < kStrips; ++strip) {
          for (int p = 0; p < kPairs; ++p) {
            const auto low = sums[t][strip][0][p], high = sums[t][strip][1][p];
            result[t][2 * p][strip] = (Float)vuzp1q_f32(low, high);
            result[t][2 * p + 1][strip] = (Float)vuzp2q_f32(low, high);
          }
        }
      }
    }
  }

  template <Kind K, int P>
  [[gnu::always_inline]] static void add_group(const IntegerTile& tile, std::size_t group,
                                               const RowPair (&pairs)[P],
                                               float32x4_t (&sums)[kStrips][2][P]) {
    constexpr int kBlock = P == 8 ? 1 : P >= 2 ? 2 : 4;  // strips: 8 or 16 sums
    const std::size_t block = tile.lane_of_block(group);
    for (int strip = 0; strip < kStrips; strip += kBlock) {
      const std::size_t lane = block + static_cast<std::size_t>(strip * kWidth);
      int32x4_t dots[kBlock][2][P];
      for (int s = 0; s < kBlock; ++s) {
        const auto zero = zeros<K>(tile, lane + static_cast<std::size_t>(s * kWidth), 0);
        for (int p = 0; p < P; ++p) {
          dots[s][0][p] = vzip1q_s32(zero, zero) * pairs[p].minus_sum;
          dots[s][1][p] = vzip2q_s32(zero, zero) * pairs[p].minus_sum;
        }
      }
      unrolled<kActivationGroup / 8>([&]<int I>(Count<I>) __attribute__((always_inline)) {
        for (int s = 0; s < kBlock; ++s) {
          const auto a = (uint32x4_t)step_codes<K, 2 * I, K.codebook_offset()>(tile, group, strip + s);
          const auto b = (uint32x4_t)step_codes<K, 2 * I + 1, K.codebook_offset()>(tile, group, strip + s);
          const auto low = (uint8x16_t)vzip1q_u32(a, b), high = (uint8x16_t)vzip2q_u32(a, b);
          for (int p = 0; p < P; ++p) {
            dots[s][0][p] = vusmmlaq_s32(dots[s][0][p], low, pairs[p].columns[I]);
            dots[s][1][p] = vusmmlaq_s32(dots[s][1][p], high, pairs[p].columns[I]);
          }
        }
      });
      for (int s = 0; s < kBlock; ++s) {
        const auto scale = (float32x4_t)GroupTerms<Neon, K>(tile, group, block, strip + s).scale();
        for (int p = 0; p < P; ++p) {
          sums[strip + s][0][p] += (vzip1q_f32(scale, scale) * pairs[p].scale) * vcvtq_f32_s32(dots[s][0][p]);
          sums[strip + s][1][p] += (vzip2q_f32(scale, scale) * pairs[p].scale) * vcvtq_f32_s32(dots[s][1][p]);
        }
      }
    }
  }
};

}  // namespace

constinit const KernelTable neon_i8mm_table = table_of<NeonI8mm>("neon-i8mm");

}  // namespace edgert
