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

// Of one weight, in steps of its scale.
float code_deviation(const Format& format) noexcept {
  const float codes = static_cast<float>(1 << format.bits);
  const float of_zero = format.zero == ZeroType::none ? 0.0F : 0.25F;
  return std::sqrt((codes * codes - 1) / 12 + of_zero);
}

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

void fill_integer_tile(const Format& format, const TileLayout& layout, std::size_t present,
                       std::uint16_t scale, Random& random, std::byte* tile) noexcept {
  const std::size_t code_bytes = layout.scale_offset(0, 0);  // a multiple of 64
  for (std::size_t at = 0; at < code_bytes; at += sizeof(std::uint64_t)) store(tile + at, random.next());
  if (format.zero == ZeroType::none) {
    const auto middle = static_cast<std::byte>(1 << (format.bits - 1));
    std::replace(tile, tile + code_bytes, std::byte{0}, middle);  // code 0 is unused
  }
  const unsigned below_middle = (1U << (format.bits - 1)) - 1;
  for (std::size_t group = 0; group < layout.groups(); ++group) {
    const std::uint64_t coins = random.next();
    for (std::size_t row = 0; row < present; ++row) {
      store(tile + layout.scale_offset(group, row), scale);
      if (format.zero == ZeroType::none) continue;
      tile[layout.zero_offset(group, row)] = static_cast<std::byte>(below_middle + ((coins >> row) & 1));
    }
  }
}

std::uint16_t integer_scale(const Format& format, std::size_t cols, float deviation) {
  if (cols % static_cast<std::size_t>(format.group) != 0) {
    throw Error(ErrorKind::invalid_argument, std::to_string(cols) + " columns of random " +
                                                 std::string(format.name) + ": needed is a multiple of " +
                                                 std::to_string(format.group));
  }
  const std::uint16_t scale = float_to_half(deviation / code_deviation(format));
  const float held = half_to_float(scale);
  if (!(held >= 0x1p-14F && held <= 65504.0F)) {  // normal, so that rounding stays under 1 %
    std::ostringstream message;
    message << "deviation: found " << deviation << ", which " << format.name << "'s scale does not hold";
    throw Error(ErrorKind::invalid_argument, message.str());
  }
  return scale;
}

}  // namespace

void fill_random(const Format& format, std::size_t rows, std::size_t cols, float deviation,
                 std::uint64_t seed, std::span<std::byte> destination) {
  const std::size_t bytes = packed_bytes(format, rows, cols);
  if (destination.size() != bytes) {
    throw Error(ErrorKind::invalid_argument, "destination has " + std::to_string(destination.size()) +
                                                 " bytes; needed are " + std::to_string(bytes));
  }
  const std::uint16_t scale = format.is_float() ? 0 : integer_scale(format, cols, deviation);
  Random random(seed);
  std::fill(destination.begin(), destination.end(), std::byte{0});
  std::byte* tile = destination.data();
  for (std::size_t row = 0; row < rows; row += kRows, tile += tile_bytes(format, cols)) {
    const std::size_t present = std::min(kRows, rows - row);
    if (format.is_float()) {
      fill_float_tile(format, present, cols, deviation, random, tile);
    } else {
      fill_integer_tile(format, TileLayout(format, cols), present, scale, random, tile);
    }
  }
}

}  // namespace edgert
