#include "quant/random.h"

#include <algorithm>
#include <cmath>
#include <sstream>
#include <string>

#include "platform/error.h"
#include "quant/layout.h"
#include "quant/pack.h"
#include "quant/tile.h"

namespace edgert {

namespace {

constexpr std::size_t kRows = kTileRows;

// SplitMix64: a counter, mixed.
class Random {
 public:
  explicit Random(std::uint64_t seed) noexcept : state_(seed) {}
  std::uint64_t next() noexcept {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15U;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
    return z ^ (z >> 31);
  }

 private:
  std::uint64_t state_;
};

void fill_float_tile(const Format& format, std::size_t present, std::size_t cols, float deviation,
                     Random& random, std::byte* tile) noexcept {
  const float step = deviation * std::sqrt(3.0F) * 0x1p-23F;
  for (std::size_t at = 0; at < cols * kRows; ++at) {
    if (at % kRows >= present) continue;
    const auto centred = static_cast<std::int32_t>(random.next() >> 40) - (1 << 23);
    const float weight = step * static_cast<float>(centred);
    if (format.id == FormatId::f32) {
      store(tile + 4 * at, weight);
    } else {
      store(tile + 2 * at, format.id == FormatId::f16 ? float_to_half(weight) : float_to_bfloat(weight));
    }
  }
}

// Scales of a block whose weights have the deviation asked for, once its codes are all alike.
class BlockScales {
 public:
  BlockScales(const Format& format, std::size_t cols, float deviation) : format_(format) {
    if (cols % static_cast<std::size_t>(format.block) != 0) {
      throw Error(ErrorKind::invalid_argument, std::to_string(cols) + " columns of random " +
                                                   std::string(format.name) + ": needed is a multiple of " +
                                                   std::to_string(format.block));
    }
    double sum = 0, squares = 0;
    const int codes = 1 << format.bits;
    for (int code = 0; code < codes; ++code) {
      const bool is_index = format.codebook != Codebook::none;
      const int value = is_index ? codebook_values(format.codebook)[static_cast<std::size_t>(code)]
                        : format.has_minima() ? code
                                              : code - codes / 2;
      sum += value;
      squares += value * value;
    }
    const double mean = sum / codes;
    const double variance = squares / codes - (format.has_minima() ? mean * mean : 0.0);
    const int integer = format.has_blocks() ? 8 : 1;  // of both scales and minima
    const double scale = static_cast<double>(deviation) / std::sqrt(variance) / integer;
    // So large that rounding stays under 1 %.
    if (!(scale >= 0x1p-18 && scale * std::max(mean, 1.0) <= 65504)) {
      std::ostringstream message;
      message << "deviation: found " << deviation << ", which " << format.name << "'s scale does not hold";
      throw Error(ErrorKind::invalid_argument, message.str());
    }
    if (format.scale == ScaleType::e8m0) {
      const int power = std::ilogb(scale);
      const double ratio = std::ldexp(scale, -power);
      block_.scale = static_cast<std::uint16_t>(power + 128);
      doubled_ = static_cast<std::uint32_t>((ratio * ratio - 1) / 3 * 0x1p32);
    } else {
      block_.scale = float_to_half(static_cast<float>(scale));
    }
    block_.minimum = float_to_half(static_cast<float>(scale * mean));
    block_.group_scales.fill(static_cast<std::int8_t>(integer));
    block_.zeros.fill(static_cast<std::uint8_t>(integer));
  }

  // Chance centres what has no middle: the zero is one of the two beside the mean, or a scale changes its
  // sign. Powers of two double where chance says so, so that the squares have the mean asked for.
  BlockRow draw(Random& random) const noexcept {
    BlockRow block = block_;
    const std::uint64_t coins = random.next();
    const auto coin = [coins](std::size_t i) { return static_cast<int>(coins >> i & 1); };
    if (format_.scale == ScaleType::e8m0) {
      block.scale = static_cast<std::uint16_t>(block.scale + (coins >> 32 < doubled_ ? 1 : 0));
    } else if (format_.zero == ZeroType::u8) {
      block.zeros[0] = static_cast<std::uint8_t>((1 << (format_.bits - 1)) - coin(0));
    } else if (!format_.has_minima() && format_.scale == ScaleType::i8) {
      for (std::size_t g = 0; g < block.group_scales.size(); ++g) {
        if (coin(g) != 0) block.group_scales[g] = static_cast<std::int8_t>(-block.group_scales[g]);
      }
    } else if (!format_.has_minima()) {
      block.scale = static_cast<std::uint16_t>(block.scale | coin(0) << 15);
    }
    return block;
  }

 private:
  const Format& format_;
  BlockRow block_{};
  std::uint32_t doubled_ = 0;  // of 2^32
};

void fill_integer_tile(const TileLayout& layout, const BlockScales& scales, std::size_t present,
                       Random& random, std::byte* tile) noexcept {
  for (std::size_t at = 0; at < layout.code_bytes(); at += sizeof(std::uint64_t))
    store(tile + at, random.next());
  for (std::size_t block = 0; block < layout.blocks(); ++block) {
    for (std::size_t row = 0; row < present; ++row)
      layout.store_scales(tile, block, row, scales.draw(random));
  }
}

}  // namespace

void fill_random(const Format& format, std::size_t rows, std::size_t cols, float deviation,
                 std::uint64_t seed, std::span<std::byte> destination) {
  check_bytes("destination", destination.size(), packed_bytes(format, rows, cols));
  Random random(seed);
  std::fill(destination.begin(), destination.end(), std::byte{0});
  std::byte* tile = destination.data();
  const auto fill_tiles = [&](auto&& fill) {
    for (std::size_t row = 0; row < rows; row += kRows, tile += tile_bytes(format, cols)) {
      fill(std::min(kRows, rows - row));
    }
  };
  if (format.is_float()) {
    fill_tiles([&](std::size_t present) { fill_float_tile(format, present, cols, deviation, random, tile); });
  } else {
    const TileLayout layout(format, cols);
    const BlockScales scales(format, cols, deviation);
    fill_tiles([&](std::size_t present) { fill_integer_tile(layout, scales, present, random, tile); });
  }
}

}  // namespace edgert
