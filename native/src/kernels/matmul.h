// Packed weights [rows, cols] times activations, over any vector class (see vector.h).
//
// Law 1: lanes are the 16 rows of a tile, and each (row, activation row) pair accumulates by itself in one
// order, so neither the number of activation rows nor the split into tiles can change a bit.
//   float formats    four sums by column mod 4, added as (0 + 1) + (2 + 3)
//   integer formats  one exact int32 an activation group, dot = sum of (value - zero) * activation, each
//   times its
//                    group's integer where scales are integers; minima likewise = sum of minimum *
//                    activation. Then, group by group and never fused, with the f16 or e8m0 of the block, sum
//                    += (scale * activation scale) * dot [- (minimum * activation scale) * minima]
#pragma once

#include <array>
#include <type_traits>
#include <utility>

#include "kernels/integer_tile.h"

namespace edgert {

// 16 results of M activation rows.
template <class V, int M>
using TileResult = typename V::Float[M][V::kStrips];

// A float tile element[cols][16] times M rows of x. Columns go in chunks that stay in L1, so that a strip can
// keep its sums in registers. As many bytes from `ahead` on, where it is not null, are asked for meanwhile, a
// little at a time: many at once wait for one another.
template <class V, class Element, int M>
void float_tile(const Element* tile, std::size_t cols, const float* const (&x)[M], TileResult<V, M>& result,
                const std::byte* ahead) {
  using Float = typename V::Float;
  constexpr std::size_t kSums = 4, kChunk = 128, kColumn = kTileRows * sizeof(Element);
  Float sums[V::kStrips][M][kSums] = {};
  for (std::size_t begin = 0; begin < cols; begin += kChunk) {
    const std::size_t end = begin + kChunk < cols ? begin + kChunk : cols;
    for (int strip = 0; strip < V::kStrips; ++strip) {
      const Element* column = tile + begin * kTileRows + strip * V::kWidth;
      Float strip_sums[M][kSums];  // in registers
      __builtin_memcpy(strip_sums, sums[strip], sizeof strip_sums);
      auto add = [&](std::size_t k, std::size_t j) {
        const Float w = V::load(column);
        column += kTileRows;
#pragma GCC unroll 8
        for (int r = 0; r < M; ++r) strip_sums[r][j] = V::madd(w, V::splat(x[r][k + j]), strip_sums[r][j]);
      };
      std::size_t k = begin;
      for (; k + kSums <= end; k += kSums) {
        if (strip == 0 && ahead != nullptr) prefetch(ahead + k * kColumn, kSums * kColumn);
#pragma GCC unroll 4
        for (std::size_t j = 0; j < kSums; ++j) add(k, j);
      }
#pragma GCC unroll 4
      for (std::size_t j = 0; j < kSums; ++j) {
        if (k + j < end) add(k, j);
      }
      __builtin_memcpy(sums[strip], strip_sums, sizeof strip_sums);
    }
  }
  for (int strip = 0; strip < V::kStrips; ++strip) {
    for (int r = 0; r < M; ++r) {
      const auto& s = sums[strip][r];
      result[r][strip] = (s[0] + s[1]) + (s[2] + s[3]);
    }
  }
}

// Activation rows that a product takes together: half of them where each needs a second sum.
template <class V, Kind K>
constexpr int row_block() {
  if constexpr (V::kOwnIntegerTiles) {
    return V::template row_block<K>();
  } else {
    constexpr bool kTwoSums = K.halves == 2 || Dot<V, K.largest(), kSteps>::kSpan != kSteps;
    return kTwoSums ? V::kRowBlock / 2 : V::kRowBlock;
  }
}

// The zeros of the groups that have one each, less what the dot product of 8-bit codes has taken already.
template <class V, Kind K, int Shift>
[[gnu::always_inline]] inline typename V::Int group_zeros(const IntegerTile& tile, std::size_t block,
                                                          int strip) {
  const std::size_t lane = block + static_cast<std::size_t>(strip * V::kWidth);
  if constexpr (K.zero != ZeroType::u8) return typename V::Int{};
  return (tile.zeros != nullptr ? V::load_u8(tile.zeros + lane) : V::splat(1 << (K.bits - 1))) + Shift;
}

// T integer tiles times M quantised rows: codes are unpacked once for all rows, activations are fetched once
// for all tiles. `result` holds the sums meanwhile: they are touched once a group, and may live in memory.
// What is indexed by row or tile stays in registers only where the loops over them unroll, which GCC has to
// be told.
template <class V, Kind K, int M, int T>
  requires(!V::kOwnIntegerTiles)
void integer_tiles(const IntegerTile (&tiles)[T], bool first, const QuantizedRow (&x)[M],
                   TileResult<V, M> (&result)[T]) {
  constexpr int kZeroShift = K.largest() == 255 ? V::kInt8Zero - 128 : 0, kZero = K.zero_code() + kZeroShift;
  constexpr int kHalfSteps = kSteps / K.halves;
  const std::size_t groups = tiles[0].padded / kActivationGroup;
  Prefetch<K.bits, M, T> prefetch[T];
  for (int t = 0; t < T; ++t) {
    prefetch[t] = Prefetch<K.bits, M, T>(tiles[t]);
    for (auto& row : result[t]) {
      for (auto& sum : row) sum = typename V::Float{};
    }
  }
  for (std::size_t g = 0; g < groups; ++g) {
    const std::size_t block = tiles[0].lane_of_block(g);
    if (first) {
      for (const auto& ahead : prefetch) ahead(g);
    }
    // 16 registers are for the dot products, not for these sums as well.
    if constexpr (M > 1 && V::kRegisters == 16) asm volatile("" : : "r"(&result) : "memory");
    for (int strip = 0; strip < V::kStrips; ++strip) {
      typename V::Int sums[T][M];  // of the halves
#pragma GCC unroll 2
      for (int half = 0; half < K.halves; ++half) {
        Dot<V, K.largest(), kHalfSteps> dots[T][M];
#pragma GCC unroll 8
        for (int step = 0; step < kHalfSteps; ++step) {
          const int at = half * kHalfSteps + step;
          typename V::Bits codes[T];
          for (int t = 0; t < T; ++t) codes[t] = step_codes<V, K>(tiles[t], g, strip, at);
#pragma GCC unroll 8
          for (int r = 0; r < M; ++r) {
            const auto activations =
                V::splat(V::template load_raw<std::uint32_t>(x[r].codes + g * kActivationGroup + 4 * at));
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) dots[t][r].add(codes[t], activations, step);
          }
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          const GroupTerms<V, K> terms(tiles[t], g, block, strip);
          const auto zeros = group_zeros<V, K, kZeroShift>(tiles[t], block, strip);
#pragma GCC unroll 8
          for (int r = 0; r < M; ++r) {
            auto dot = dots[t][r].total();
            if constexpr (K.zero == ZeroType::u8) {
              dot -= V::mul16(zeros, V::splat(x[r].sums[g].all));
            } else if constexpr (kZero != 0) {
              dot -= V::splat(kZero * x[r].sum(g, half, K.halves));
            }
            dot = terms.scaled(dot, half);
            if (half > 0) dot += sums[t][r];
            if (half + 1 < K.halves) {
              sums[t][r] = dot;
            } else {
              result[t][r][strip] += terms.term(dot, x[r], g);
            }
          }
        }
      }
    }
  }
}

template <class V, Kind K, int M, int T>
  requires V::kOwnIntegerTiles
void integer_tiles(const IntegerTile (&tiles)[T], bool first, const QuantizedRow (&x)[M],
                   TileResult<V, M> (&result)[T]) {
  V::template integer_tiles<K, M, T>(tiles, first, x, result);
}

template <class V>
std::size_t activation_row(const MatMul& work, std::size_t m) {
  return work.gather ? static_cast<std::size_t>(work.gather[m]) : m;
}

// Adds the bias and stores the rows that exist.
template <class V, int M>
void store_tile(const MatMul& work, std::size_t tile, std::size_t m, const TileResult<V, M>& result) {
  for (int strip = 0; strip < V::kStrips; ++strip) {
    const std::size_t row = tile * kTileRows + static_cast<std::size_t>(strip * V::kWidth);
    const auto lanes = static_cast<std::ptrdiff_t>(work.rows) - static_cast<std::ptrdiff_t>(row);
    if (lanes <= 0) return;
    for (int r = 0; r < M; ++r) {
      auto v = result[r][strip];
      if (work.bias) v += V::load_partial(work.bias + row, lanes, 0.0f);
      V::store_partial(work.y + (m + static_cast<std::size_t>(r)) * work.y_stride + row, v, lanes);
    }
  }
}

template <class V, class Element>
void float_matmul(const MatMul& work, std::size_t tile_begin, std::size_t tile_end) {
  constexpr std::size_t kAhead = 4096;
  const std::size_t stride = tile_bytes(format(work.format), work.cols);
  for (std::size_t t = tile_begin; t < tile_end; ++t) {
    const auto* tile = reinterpret_cast<const Element*>(work.weights + t * stride);
    for_each_block<V::kRegisters / 8>(work.m, [&]<int M>(Count<M>, std::size_t m) {
      const float* x[M];
      for (int r = 0; r < M; ++r) {
        x[r] = work.x + activation_row<V>(work, m + static_cast<std::size_t>(r)) * work.x_stride;
      }
      TileResult<V, M> result;
      const auto* ahead = m == 0 ? reinterpret_cast<const std::byte*>(tile) + kAhead : nullptr;
      float_tile<V, Element, M>(tile, work.cols, x, result, ahead);
      store_tile<V, M>(work, t, m, result);
    });
  }
}

// Asks for the `part`-th of `parts` of the tile that follows, into the second-level cache.
inline void prefetch_next(const IntegerTile& tile, std::size_t part, std::size_t end, std::size_t parts) {
  const std::byte* const next = tile.codes + tile.next;
  for (std::size_t i = tile.bytes * part / parts / 64 * 64; i < tile.bytes * end / parts; i += 64) {
    __builtin_prefetch(next + i, 0, 2);
  }
}

template <class V, Kind K, int T>
void integer_tile_block(const MatMul& work, const IntegerTile (&tiles)[T], std::size_t first, bool more) {
  const QuantizedRows& q = work.quantized;
  const std::size_t x_groups = q.padded / kActivationGroup;
  for_each_block<row_block<V, K>()>(work.m, [&]<int M>(Count<M>, std::size_t m) {
    QuantizedRow x[M];
    for (int r = 0; r < M; ++r) {
      const std::size_t row = activation_row<V>(work, m + static_cast<std::size_t>(r));
      x[r] = {q.codes + row * q.padded, q.scales + row * x_groups, q.sums + row * x_groups};
    }
    // Of many rows only the first block finds weights that are not in a cache yet.
    if (work.m > M && more) {
      for (const IntegerTile& tile : tiles) prefetch_next(tile, m, m + M, work.m);
    }
    TileResult<V, M> result[T];
    integer_tiles<V, K, M, T>(tiles, m == 0, x, result);
    for (int t = 0; t < T; ++t) store_tile<V, M>(work, first + static_cast<std::size_t>(t), m, result[t]);
  });
}

template <class V, Kind K>
void integer_matmul(const MatMul& work, std::size_t tile_begin, std::size_t tile_end) {
  const Format& f = format(work.format);
  const TileParts parts = tile_parts(f, work.cols);
  const std::size_t padded = padded_cols(f, work.cols);
  const auto multiply = [&]<int T>(Count<T>, std::size_t t) {
    IntegerTile tiles[T];
    for (std::size_t i = 0; i < T; ++i) {
      tiles[i] = IntegerTile(f, parts, work.weights + (tile_begin + t + i) * parts.bytes, padded);
      tiles[i].next *= T;
      const std::size_t following = tile_begin + t + i + T;
      tiles[i].ahead = following < tile_end ? work.weights + following * parts.bytes : work.after;
    }
    integer_tile_block<V, K, T>(work, tiles, tile_begin + t, tile_begin + t + T < tile_end);
  };
  if (work.m == 1) {
    for_each_block<1>(tile_end - tile_begin, multiply);
  } else {
    for_each_block<V::kTileBlock>(tile_end - tile_begin, multiply);
  }
}

template <class V, FormatId Id>
void matmul_of(const MatMul& work, std::size_t tile_begin, std::size_t tile_end) {
  constexpr const Format& f = format(Id);
  if constexpr (!f.is_float()) {
    integer_matmul<V, kind_of(f)>(work, tile_begin, tile_end);
  } else {
    using Element =
        std::conditional_t<Id == FormatId::f32, float, std::conditional_t<Id == FormatId::f16, Half, Bfloat>>;
    float_matmul<V, Element>(work, tile_begin, tile_end);
  }
}

template <class V>
void matmul(const MatMul& work, std::size_t tile_begin, std::size_t tile_end) {
  static constexpr auto kProducts = []<std::size_t... I>(std::index_sequence<I...>) {
    return std::array{&matmul_of<V, static_cast<FormatId>(I)>...};
  }(std::make_index_sequence<kFormats.size()>{});
  kProducts[static_cast<std::size_t>(work.format)](work, tile_begin, tile_end);
}

}  // namespace edgert
