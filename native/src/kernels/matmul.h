// Packed weights [rows, cols] times activations, over any vector class (see vector.h).
//
// Law 1: lanes are the 16 rows of a tile, and each (row, activation row) pair accumulates by itself in one
// order, so neither the number of activation rows nor the split into tiles can change a bit.
//   float formats    four sums by column mod 4, added as (0 + 1) + (2 + 3)
//   integer formats  one exact int32 sum an activation group, then, group by group and never fused,
//                    sum += (weight scale * activation scale) * (dot - zero * activation sum)
#pragma once

#include <bit>

#include "kernels/kernels.h"
#include "kernels/tables.h"
#include "kernels/vector.h"

namespace edgert {

// 16 results of M activation rows.
template <class V, int M>
using TileResult = typename V::Float[M][V::kStrips];

// A float tile element[cols][16] times M rows of x. Columns go in chunks that stay in L1, so that a strip can
// keep its sums in registers.
template <class V, class Element, int M>
void float_tile(const Element* tile, std::size_t cols, const float* const (&x)[M], TileResult<V, M>& result) {
  using Float = typename V::Float;
  constexpr std::size_t kSums = 4, kChunk = 128;
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

// Where the parts of one integer tile lie.
struct IntegerTile {
  const std::byte* codes;
  const Half* scales;         // [group][16]
  const std::uint8_t* zeros;  // [group][16] or null
  std::size_t padded;         // columns
  int scale_shift;            // log2 of the activation groups that share a scale
  std::size_t bytes;          // of the tile
  std::size_t next;           // from this tile to the one that its thread takes next

  std::size_t scales_of(std::size_t group) const { return (group >> scale_shift) * kTileRows; }
};

struct QuantizedRow {
  const std::int8_t* codes;
  const float* scales;
  const std::int32_t* sums;
};

inline constexpr int kSteps = kActivationGroup / 4;  // 4-way dot products in an activation group

// Weights come from memory in order: asks for those of a tile well ahead, past its end in the tile that its
// thread takes next, and for that one's scales and zeros. Weights of a single row are not wanted again. (int4
// of a single row, AVX-512, two tiles: 0.94 of what a loop that only reads reaches, 0.80 asked for 9 KiB
// ahead, 0.71 for 3 KiB, 0.72 without the scales.)
template <int Bits, int M, int T>
struct Prefetch {
  static constexpr std::size_t kGroupBytes = kActivationGroup * kTileRows * Bits / 8, kAhead = 5120 / T;
  static constexpr int kLocality = M == 1 ? 0 : 3;

  Prefetch() = default;
  [[gnu::always_inline]] explicit Prefetch(const IntegerTile& tile)
      : codes(tile.codes),
        code_bytes(tile.padded * kTileRows * Bits / 8),
        next(tile.next),
        scales(tile.codes + code_bytes + next),
        scale_bytes((tile.bytes - code_bytes) / (tile.padded / kActivationGroup)) {}

  [[gnu::always_inline]] void operator()(std::size_t group) const {
    std::size_t at = group * kGroupBytes + kAhead;
    if (at >= code_bytes) at += next - code_bytes;
    for (std::size_t i = 0; i < kGroupBytes; i += 64) __builtin_prefetch(codes + at + i, 0, kLocality);
    __builtin_prefetch(scales + group * scale_bytes, 0, kLocality);
  }

  const std::byte* codes;
  std::size_t code_bytes;
  std::size_t next;
  const std::byte* scales;
  std::size_t scale_bytes;  // and zeros, of a group
};

// One step's codes of one strip of an activation group: four columns.
template <class V, int Bits>
[[gnu::always_inline]] inline typename V::Bits unpack_step(const IntegerTile& tile, std::size_t group,
                                                           int strip, int step) {
  if constexpr (Bits == 3) {
    IntegerTile high_plane = tile;
    high_plane.codes += tile.padded * kTileRows * 2 / 8;
    return unpack_step<V, 2>(tile, group, strip, step) |
           (unpack_step<V, 1>(high_plane, group, strip, step) << 2);
  } else {
    constexpr int kStepsAVector = 8 / Bits;
    constexpr std::uint32_t kMask = 0x01010101u * ((1u << Bits) - 1);
    const std::byte* p =
        tile.codes + group * (kActivationGroup * kTileRows * Bits / 8) + strip * V::kWidth * 4;
    const auto v = V::template load_raw<typename V::Bits>(p + step / kStepsAVector * 64);
    return (v >> (Bits * (step % kStepsAVector))) & kMask;
  }
}

// The exact dot product of an activation group, summed step by step.
template <class V, int Bits>
struct Dot {
  typename V::Narrow sum{};
  [[gnu::always_inline]] void add(typename V::Bits codes, typename V::Bits x) {
    sum = V::dot_narrow(sum, codes, x);
  }
  [[gnu::always_inline]] typename V::Int total() const { return V::widen(sum); }
};
template <class V>
struct Dot<V, 8> {
  typename V::Int sum{};
  [[gnu::always_inline]] void add(typename V::Bits codes, typename V::Bits x) {
    sum = V::dot_int8(sum, codes, x);
  }
  [[gnu::always_inline]] typename V::Int total() const { return sum; }
};

// T integer tiles times M quantised rows: codes are unpacked once for all rows, activations are fetched once
// for all tiles. `result` holds the sums meanwhile: they are touched once a group, and may live in memory.
// What is indexed by row or tile stays in registers only where the loops over them unroll, which GCC has to
// be told.
template <class V, int Bits, int M, int T>
  requires(!V::kOwnIntegerTiles)
void integer_tiles(const IntegerTile (&tiles)[T], bool first, const QuantizedRow (&x)[M],
                   TileResult<V, M> (&result)[T]) {
  constexpr int kZeroShift = Bits == 8 ? V::kInt8Zero - 128 : 0;
  const std::size_t groups = tiles[0].padded / kActivationGroup;
  Prefetch<Bits, M, T> prefetch[T];
  for (int t = 0; t < T; ++t) {
    prefetch[t] = Prefetch<Bits, M, T>(tiles[t]);
    for (auto& row : result[t]) {
      for (auto& sum : row) sum = typename V::Float{};
    }
  }
  for (std::size_t g = 0; g < groups; ++g) {
    const std::size_t row_of_scales = tiles[0].scales_of(g);
    if (first) {
      for (const auto& ahead : prefetch) ahead(g);
    }
    // 16 registers are for the dot products, not for these sums as well.
    if constexpr (M > 1 && V::kRegisters == 16) asm volatile("" : : "r"(&result) : "memory");
    for (int strip = 0; strip < V::kStrips; ++strip) {
      Dot<V, Bits> dots[T][M];
#pragma GCC unroll 8
      for (int step = 0; step < kSteps; ++step) {
        typename V::Bits codes[T];
        for (int t = 0; t < T; ++t) codes[t] = unpack_step<V, Bits>(tiles[t], g, strip, step);
#pragma GCC unroll 8
        for (int r = 0; r < M; ++r) {
          const auto activations =
              V::splat(V::template load_raw<std::uint32_t>(x[r].codes + g * kActivationGroup + 4 * step));
#pragma GCC unroll 8
          for (int t = 0; t < T; ++t) dots[t][r].add(codes[t], activations);
        }
      }
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const std::size_t lane = row_of_scales + static_cast<std::size_t>(strip * V::kWidth);
        const auto scale = V::load(tiles[t].scales + lane);
        const auto zero =
            (tiles[t].zeros ? V::load_u8(tiles[t].zeros + lane) : V::splat(1 << (Bits - 1))) + kZeroShift;
#pragma GCC unroll 8
        for (int r = 0; r < M; ++r) {
          const auto centred = V::to_float(dots[t][r].total() - V::mul16(zero, V::splat(x[r].sums[g])));
          result[t][r][strip] += (scale * V::splat(x[r].scales[g])) * centred;
        }
      }
    }
  }
}

template <class V, int Bits, int M, int T>
  requires V::kOwnIntegerTiles
void integer_tiles(const IntegerTile (&tiles)[T], bool first, const QuantizedRow (&x)[M],
                   TileResult<V, M> (&result)[T]) {
  V::template integer_tiles<Bits, M, T>(tiles, first, x, result);
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
  const std::size_t stride = tile_bytes(format(work.format), work.cols);
  for (std::size_t t = tile_begin; t < tile_end; ++t) {
    const auto* tile = reinterpret_cast<const Element*>(work.weights + t * stride);
    for_each_block<V::kRegisters / 8>(work.m, [&]<int M>(Count<M>, std::size_t m) {
      const float* x[M];
      for (int r = 0; r < M; ++r) {
        x[r] = work.x + activation_row<V>(work, m + static_cast<std::size_t>(r)) * work.x_stride;
      }
      TileResult<V, M> result;
      float_tile<V, Element, M>(tile, work.cols, x, result);
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

template <class V, int Bits, int T>
void integer_tile_block(const MatMul& work, const IntegerTile (&tiles)[T], std::size_t first, bool more) {
  const QuantizedRows& q = work.quantized;
  const std::size_t x_groups = q.padded / kActivationGroup;
  for_each_block<V::kRowBlock>(work.m, [&]<int M>(Count<M>, std::size_t m) {
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
    integer_tiles<V, Bits, M, T>(tiles, m == 0, x, result);
    for (int t = 0; t < T; ++t) store_tile<V, M>(work, first + static_cast<std::size_t>(t), m, result[t]);
  });
}

template <class V, int Bits>
void integer_matmul(const MatMul& work, std::size_t tile_begin, std::size_t tile_end) {
  const Format& f = format(work.format);
  const std::size_t stride = tile_bytes(f, work.cols);
  const std::size_t padded = padded_cols(f, work.cols);
  const auto group = static_cast<std::size_t>(f.group);
  const int shift = std::countr_zero(group / kActivationGroup);  // groups are powers of two
  const auto tile_at = [&](std::size_t t) {
    IntegerTile tile{work.weights + t * stride, nullptr, nullptr, padded, shift, stride, stride};
    tile.scales = reinterpret_cast<const Half*>(tile.codes + padded * kTileRows * Bits / 8);
    if (f.zero == ZeroType::u8) {
      tile.zeros = reinterpret_cast<const std::uint8_t*>(tile.scales + padded / group * kTileRows);
    }
    return tile;
  };
  const auto multiply = [&]<int T>(Count<T>, std::size_t t) {
    IntegerTile tiles[T];
    for (std::size_t i = 0; i < T; ++i) {
      tiles[i] = tile_at(tile_begin + t + i);
      tiles[i].next *= T;
    }
    integer_tile_block<V, Bits, T>(work, tiles, tile_begin + t, tile_begin + t + T < tile_end);
  };
  for_each_block<V::kTileBlock>(tile_end - tile_begin, multiply);
}

template <class V>
void matmul(const MatMul& work, std::size_t tile_begin, std::size_t tile_end) {
  switch (work.format) {
    case FormatId::f32:
      return float_matmul<V, float>(work, tile_begin, tile_end);
    case FormatId::f16:
      return float_matmul<V, Half>(work, tile_begin, tile_end);
    case FormatId::bf16:
      return float_matmul<V, Bfloat>(work, tile_begin, tile_end);
    case FormatId::int8:
      return integer_matmul<V, 8>(work, tile_begin, tile_end);
    case FormatId::int4:
      return integer_matmul<V, 4>(work, tile_begin, tile_end);
    case FormatId::int3:
      return integer_matmul<V, 3>(work, tile_begin, tile_end);
    case FormatId::int2:
      return integer_matmul<V, 2>(work, tile_begin, tile_end);
    default:
      return scalar_table.matmul(work, tile_begin, tile_end);
  }
}

}  // namespace edgert
