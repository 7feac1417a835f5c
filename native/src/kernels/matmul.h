// Packed weights [rows, cols] times activations, over any vector class (see vector.h).
//
// Law 1: lanes are the 16 rows of a tile, and each (row, activation row) pair accumulates by itself in one
// order, so neither the number of activation rows nor the split into tiles can change a bit.
//   float formats    four sums by column mod 4, added as (0 + 1) + (2 + 3)
//   integer formats  one exact int32 sum an activation group, then, group by group and never fused,
//                    sum += (weight scale * activation scale) * (dot - zero * activation sum)
#pragma once

#include "kernels/kernels.h"
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
      auto add = [&](std::size_t k, std::size_t j) {
        const Float w = V::load(column);
        column += kTileRows;
        for (int r = 0; r < M; ++r) sums[strip][r][j] = V::madd(w, V::splat(x[r][k + j]), sums[strip][r][j]);
      };
      std::size_t k = begin;
      for (; k + kSums <= end; k += kSums) {
        for (std::size_t j = 0; j < kSums; ++j) add(k, j);
      }
      for (std::size_t j = 0; k + j < end; ++j) add(k, j);
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
  std::size_t group;          // columns of a scale, a multiple of kActivationGroup
};

struct QuantizedRow {
  const std::int8_t* codes;
  const float* scales;
  const std::int32_t* sums;
};

inline constexpr int kSteps = kActivationGroup / 4;  // 4-way dot products in an activation group

// Weights come from memory once, in order: ask for them well ahead, past the tile's end as well. (int4 of a
// single row, AVX-512: 26 GB/s a thread without, 36 with.)
template <int Bits>
[[gnu::always_inline]] inline void prefetch_group(const IntegerTile& tile, std::size_t group) {
  constexpr std::size_t kAhead = 6144, kGroupBytes = kActivationGroup * kTileRows * Bits / 8;
  const std::byte* p = tile.codes + group * kGroupBytes + kAhead;
  for (std::size_t i = 0; i < kGroupBytes; i += 64) __builtin_prefetch(p + i);
}

// The codes of one strip of an activation group, four columns a step.
template <class V, int Bits>
[[gnu::always_inline]] inline void unpack_group(const IntegerTile& tile, std::size_t group, int strip,
                                                typename V::Bits (&codes)[kSteps]) {
  if constexpr (Bits == 3) {
    typename V::Bits high[kSteps];
    IntegerTile high_plane = tile;
    high_plane.codes += tile.padded * kTileRows * 2 / 8;
    unpack_group<V, 2>(tile, group, strip, codes);
    unpack_group<V, 1>(high_plane, group, strip, high);
    for (int step = 0; step < kSteps; ++step) codes[step] |= high[step] << 2;
  } else {
    constexpr int kStepsAVector = 8 / Bits;
    constexpr std::uint32_t kMask = 0x01010101u * ((1u << Bits) - 1);
    const std::byte* p =
        tile.codes + group * (kActivationGroup * kTileRows * Bits / 8) + strip * V::kWidth * 4;
    for (int step = 0; step < kSteps; ++step) {
      const auto v = V::template load_raw<typename V::Bits>(p + step / kStepsAVector * 64);
      codes[step] = (v >> (Bits * (step % kStepsAVector))) & kMask;
    }
  }
}

template <class V, int Bits>
[[gnu::always_inline]] inline typename V::Int dot_group(const typename V::Bits (&codes)[kSteps],
                                                        const std::int8_t* x) {
  auto activations = [x](int step) { return V::splat(V::template load_raw<std::uint32_t>(x + 4 * step)); };
  if constexpr (Bits == 8) {
    typename V::Int sum{};
    for (int step = 0; step < kSteps; ++step) sum = V::dot_int8(sum, codes[step], activations(step));
    return sum;
  } else {
    typename V::Narrow sum{};
    for (int step = 0; step < kSteps; ++step) sum = V::dot_narrow(sum, codes[step], activations(step));
    return V::widen(sum);
  }
}

// An integer tile times M quantised rows; the codes of a group are unpacked once for all of them.
template <class V, int Bits, int M>
void integer_tile(const IntegerTile& tile, const QuantizedRow (&x)[M], TileResult<V, M>& result) {
  const std::size_t groups = tile.padded / kActivationGroup, groups_a_scale = tile.group / kActivationGroup;
  constexpr int kZeroShift = Bits == 8 ? V::kInt8Zero - 128 : 0;
  typename V::Float sums[M][V::kStrips] = {};
  const Half* scales = tile.scales;
  const std::uint8_t* zeros = tile.zeros;
  for (std::size_t group = 0; group < groups; group += groups_a_scale) {
    for (int strip = 0; strip < V::kStrips; ++strip) {
      const auto scale = V::load(scales + strip * V::kWidth);
      const auto zero =
          (zeros ? V::load_u8(zeros + strip * V::kWidth) : V::splat(1 << (Bits - 1))) + kZeroShift;
      for (std::size_t g = group; g < group + groups_a_scale; ++g) {
        typename V::Bits codes[kSteps];
        if (strip == 0) prefetch_group<Bits>(tile, g);
        unpack_group<V, Bits>(tile, g, strip, codes);
        for (int r = 0; r < M; ++r) {
          const auto dot = dot_group<V, Bits>(codes, x[r].codes + g * kActivationGroup);
          const auto centred = V::to_float(dot - zero * V::splat(x[r].sums[g]));
          sums[r][strip] += (scale * V::splat(x[r].scales[g])) * centred;
        }
      }
    }
    scales += kTileRows;
    if (zeros) zeros += kTileRows;
  }
  for (int r = 0; r < M; ++r) {
    for (int strip = 0; strip < V::kStrips; ++strip) result[r][strip] = sums[r][strip];
  }
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

template <class V, int Bits>
void integer_matmul(const MatMul& work, std::size_t tile_begin, std::size_t tile_end) {
  const Format& f = format(work.format);
  const std::size_t stride = tile_bytes(f, work.cols);
  IntegerTile tile{};
  tile.padded = padded_cols(f, work.cols);
  tile.group = static_cast<std::size_t>(f.group);
  const QuantizedRows& q = work.quantized;
  const std::size_t x_groups = q.padded / kActivationGroup;
  for (std::size_t t = tile_begin; t < tile_end; ++t) {
    tile.codes = work.weights + t * stride;
    tile.scales = reinterpret_cast<const Half*>(tile.codes + tile.padded * kTileRows * Bits / 8);
    if (f.zero == ZeroType::u8) {
      tile.zeros = reinterpret_cast<const std::uint8_t*>(tile.scales + tile.padded / tile.group * kTileRows);
    }
    for_each_block<4>(work.m, [&]<int M>(Count<M>, std::size_t m) {
      QuantizedRow x[M];
      for (int r = 0; r < M; ++r) {
        const std::size_t row = activation_row<V>(work, m + static_cast<std::size_t>(r));
        x[r] = {q.codes + row * q.padded, q.scales + row * x_groups, q.sums + row * x_groups};
      }
      TileResult<V, M> result;
      integer_tile<V, Bits, M>(tile, x, result);
      store_tile<V, M>(work, t, m, result);
    });
  }
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
  }
}

}  // namespace edgert
