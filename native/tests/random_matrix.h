// Packed matrices of every format, with their weights in double precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <span>
#include <vector>

#include "kernels_support.h"
#include "quant/format.h"
#include "quant/layout.h"
#include "quant/pack.h"

namespace edgert {

// A matrix packed as docs/bundle-format.md says, and its weights in double precision.
struct Matrix {
  FormatId format;
  std::size_t rows, cols;
  std::vector<std::byte> packed;
  std::vector<double> weights;  // [rows][cols]
  std::vector<double> minima;   // what has been subtracted from them; empty where nothing has
};

inline Matrix random_float_matrix(FormatId id, std::size_t rows, std::size_t cols, Random& random) {
  Matrix matrix{id, rows, cols, std::vector<std::byte>(packed_bytes(format(id), rows, cols)), {}, {}};
  const std::size_t size = id == FormatId::f32 ? 4 : 2;
  for (std::size_t row = 0; row < rows; ++row) {
    std::byte* tile = matrix.packed.data() + row / 16 * tile_bytes(format(id), cols);
    for (std::size_t k = 0; k < cols; ++k) {
      float value = random.uniform(-2, 2);
      if (id == FormatId::f32) {
        std::memcpy(tile + (k * 16 + row % 16) * size, &value, size);
      } else {
        const bool half = id == FormatId::f16;
        if (half && k % 7 == 0) value *= 0x1p-16f;  // subnormal halves as well
        const std::uint16_t bits = half ? float_to_half(value) : float_to_bfloat(value);
        value = half ? half_to_float(bits) : bfloat_to_float(bits);
        std::memcpy(tile + (k * 16 + row % 16) * size, &bits, size);
      }
      matrix.weights.push_back(value);
    }
  }
  return matrix;
}

// Scales, zeros and minima of every size that the format has.
inline BlockRow random_scales(const Format& f, Random& random) {
  BlockRow block;
  const auto half = [&](float low, float high) { return float_to_half(random.uniform(low, high)); };
  const bool centred = f.has_blocks() || f.codebook != Codebook::none;  // scales may be negative
  block.scale = f.scale == ScaleType::e8m0 ? static_cast<std::uint16_t>(110 + random.below(20))
                                           : half(centred ? -0.1f : 0.001f, 0.1f);
  block.minimum = half(-0.5f, 0.5f);
  for (std::int8_t& scale : block.group_scales) {
    const bool nibbles = f.scale == ScaleType::u4 || f.scale == ScaleType::u4x2;
    const unsigned low = nibbles ? random.below(16) : random.below(256);
    scale = static_cast<std::int8_t>(low);
  }
  for (std::uint8_t& zero : block.zeros) {
    zero = static_cast<std::uint8_t>(random.below(f.zero == ZeroType::min_u4 ? 16 : 256));
  }
  return block;
}

// What the numbers of a block stand for, without rounding.
inline double exact_weight(const Format& f, const BlockRow& block, std::size_t column) {
  const std::size_t group = column / static_cast<std::size_t>(f.group);
  double scale = f.scale == ScaleType::e8m0 ? std::ldexp(1.0, block.scale - 128)
                                            : static_cast<double>(half_to_float(block.scale));
  if (f.has_blocks()) scale *= block.group_scales[group];
  const int code = block.codes[column];
  if (f.codebook != Codebook::none)
    return scale * codebook_values(f.codebook)[static_cast<std::size_t>(code)];
  if (f.has_minima()) return scale * code;
  return scale * (code - (f.zero == ZeroType::u8 ? block.zeros[0] : 1 << (f.bits - 1)));
}

inline double exact_minimum(const Format& f, const BlockRow& block, std::size_t column) {
  const double unit = half_to_float(block.minimum);
  return f.has_blocks() ? unit * block.zeros[column / static_cast<std::size_t>(f.group)] : unit;
}

// `code(row, column)` gives the code of columns that exist, `scales()` the rest of a block.
template <class Code, class Scales>
Matrix integer_matrix(FormatId id, std::size_t rows, std::size_t cols, Code&& code, Scales&& scales) {
  const Format& f = format(id);
  Matrix matrix{id, rows, cols, std::vector<std::byte>(packed_bytes(f, rows, cols)), {}, {}};
  matrix.weights.resize(rows * cols);
  if (f.has_minima()) matrix.minima.resize(rows * cols);
  const TileLayout layout(f, cols);
  const auto width = static_cast<std::size_t>(f.block);
  for (std::size_t b = 0; b < layout.blocks(); ++b) {
    for (std::size_t first = 0; first < rows; first += kTileRows) {
      std::vector<BlockRow> blocks(kTileRows);
      for (std::size_t row = first; row < std::min(first + kTileRows, rows); ++row) {
        BlockRow& block = blocks[row - first];
        block = scales();
        for (std::size_t k = b * width; k < std::min((b + 1) * width, cols); ++k) {
          block.codes[k - b * width] = static_cast<std::uint8_t>(code(row, k));
          double& weight = matrix.weights[row * cols + k];
          weight = exact_weight(f, block, k - b * width);
          if (!f.has_minima()) continue;
          matrix.minima[row * cols + k] = exact_minimum(f, block, k - b * width);
          weight -= matrix.minima[row * cols + k];
        }
      }
      std::byte* const tile = matrix.packed.data() + first / kTileRows * layout.bytes();
      layout.store_block(tile, b, std::span<const BlockRow, kTileRows>(blocks));
    }
  }
  return matrix;
}

template <class Code>
Matrix integer_matrix(FormatId id, std::size_t rows, std::size_t cols, Random& random, Code&& code) {
  return integer_matrix(id, rows, cols, code, [&] { return random_scales(format(id), random); });
}

inline Matrix random_matrix(FormatId id, std::size_t rows, std::size_t cols, Random& random) {
  if (format(id).is_float()) return random_float_matrix(id, rows, cols, random);
  return integer_matrix(id, rows, cols, random,
                        [&](std::size_t, std::size_t) { return random.below(1u << format(id).bits); });
}

}  // namespace edgert
