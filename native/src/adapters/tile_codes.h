// One tile of packed codes, code by code: where each lies, and what its scale makes of it.
//
// Threads: functions without state. Ownership: everything borrows the tile. REQUIRES a format that takes
// patches (patch.h), and places inside the tile.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "quant/format.h"
#include "quant/lanes.h"
#include "quant/pack.h"

namespace edgert {

// Codes of so many bits, in planes of 2^i bits, the widest first (see quant/format.h).
template <unsigned Bits>
class Codes {
 public:
  Codes(const std::byte* tile, std::size_t padded_cols, std::size_t offset = 0) noexcept
      : plane_(tile + offset),
        offset_(offset),
        rest_(tile, padded_cols, offset + padded_cols * kTileRows * kWidth / 8) {}

  unsigned get(std::size_t col, std::size_t row) const noexcept {
    const std::size_t in = col % kCols;
    const auto byte = std::to_integer<unsigned>(plane_[at(col, row)]);
    const unsigned low = byte >> (kWidth * (in / 4)) & kMask;
    return low | rest_.get(col, row) << kWidth;
  }
  // Calls use(plane, offset in the tile, bits of the byte there) for every plane in which a code lies.
  void planes(std::size_t col, std::size_t row, unsigned bits, const auto& use, std::size_t plane = 0) const {
    use(plane, offset_ + at(col, row), (bits & kMask) << (kWidth * (col % kCols / 4)));
    rest_.planes(col, row, bits >> kWidth, use, plane + 1);
  }

 private:
  static constexpr unsigned kWidth = std::bit_floor(Bits);
  static constexpr unsigned kMask = (1U << kWidth) - 1;
  static constexpr std::size_t kCols = 32 / kWidth;  // of a vector of 64 bytes
  static std::size_t at(std::size_t col, std::size_t row) noexcept {
    return col / kCols * 64 + 4 * row + col % 4;
  }
  const std::byte* plane_;
  std::size_t offset_;
  [[no_unique_address]] Codes<Bits - kWidth> rest_;
};

template <>
class Codes<0> {
 public:
  Codes(const std::byte*, std::size_t, std::size_t) noexcept {}
  unsigned get(std::size_t, std::size_t) const noexcept { return 0; }
  void planes(std::size_t, std::size_t, unsigned, const auto&, std::size_t) const noexcept {}
};

void with_codes(const Format& format, const std::byte* tile, std::size_t cols, const auto& use) {
  const std::size_t padded = padded_cols(format, cols);
  switch (format.bits) {
    case 2:
      return use(Codes<2>(tile, padded));
    case 3:
      return use(Codes<3>(tile, padded));
    case 4:
      return use(Codes<4>(tile, padded));
    case 5:
      return use(Codes<5>(tile, padded));
    case 6:
      return use(Codes<6>(tile, padded));
    case 8:
      return use(Codes<8>(tile, padded));
    default:
      return;
  }
}

// As half_to_float() (quant/pack.h), of finite ones.
inline Lanes floats_of_halves(IntLanes halves) noexcept {
  const IntLanes magnitude = halves & 0x7fff;
  const Lanes subnormal = __builtin_convertvector(magnitude, Lanes) * 0x1p-24F;
  const IntLanes normal = (magnitude << 13) + ((127 - 15) << 23);
  const IntLanes bits = magnitude < 0x400 ? std::bit_cast<IntLanes>(subnormal) : normal;
  return std::bit_cast<Lanes>(bits | (halves & 0x8000) << 16);
}

// The scales of a tile, and what its codes stand for.
class Scales {
 public:
  Scales(const Format& format, std::size_t cols, const std::byte* tile) noexcept
      : parts_(tile_parts(format, cols)),
        tile_(tile),
        scale_(format.scale),
        zero_(format.zero),
        middle_(static_cast<float>(1 << (format.bits - 1))),
        block_shift_(std::countr_zero(static_cast<unsigned>(format.block))),
        group_shift_(std::countr_zero(static_cast<unsigned>(format.group))) {}

  float at(std::size_t col, std::size_t row) const noexcept {
    const float scale = half_to_float(half(parts_.scales, col >> block_shift_, row));
    return scale_ == ScaleType::f16 ? scale : scale * factor(col, row);
  }
  // Of so many places, kTileRows * column + row each; there is room for a whole number of Lanes.
  void gather(const std::uint32_t* places, std::size_t count, float* scales) const noexcept {
    for (std::size_t i = 0; i < count; ++i) {  // all bits first: a vector of what was just stored would wait
      const std::int32_t bits =
          half(parts_.scales, places[i] / kTileRows >> block_shift_, places[i] % kTileRows);
      std::memcpy(scales + i, &bits, sizeof bits);
    }
    for (std::size_t i = 0; i < count; i += kLanes) {
      IntLanes halves;
      std::memcpy(&halves, scales + i, sizeof halves);
      const Lanes found = floats_of_halves(halves);
      std::memcpy(scales + i, &found, sizeof found);
    }
    if (scale_ == ScaleType::f16) return;
    for (std::size_t i = 0; i < count; ++i) scales[i] *= factor(places[i] / kTileRows, places[i] % kTileRows);
  }
  float weight(std::size_t col, std::size_t row, unsigned code) const noexcept {
    const float scale = at(col, row), c = static_cast<float>(code);
    const auto u8 = [&](std::size_t part) {
      return std::to_integer<unsigned>(tile_[part + group(col, row)]);
    };
    const auto minimum = [&] { return half_to_float(half(parts_.zeros, col >> block_shift_, row)); };
    switch (zero_) {
      case ZeroType::none:
        return scale * (c - middle_);
      case ZeroType::u8:
        return scale * (c - static_cast<float>(u8(parts_.zeros)));
      case ZeroType::min_f16:
        return scale * c - minimum();
      case ZeroType::min_u8:
        return scale * c - minimum() * static_cast<float>(u8(parts_.group_minima));
      case ZeroType::min_u4:
        return scale * c - minimum() * static_cast<float>(u8(parts_.group_scales) >> 4);
    }
    return 0;
  }

 private:
  std::size_t group(std::size_t col, std::size_t row) const noexcept {
    return (col >> group_shift_) * kTileRows + row;
  }
  float factor(std::size_t col, std::size_t row) const noexcept {
    const auto small = std::to_integer<std::uint8_t>(tile_[parts_.group_scales + group(col, row)]);
    return scale_ == ScaleType::i8 ? static_cast<float>(static_cast<std::int8_t>(small))
                                   : static_cast<float>(small & 15);
  }
  std::uint16_t half(std::size_t part, std::size_t block, std::size_t row) const noexcept {
    std::uint16_t bits;
    std::memcpy(&bits, tile_ + part + 2 * (block * kTileRows + row), 2);
    return bits;
  }
  const TileParts parts_;
  const std::byte* tile_;
  const ScaleType scale_;
  const ZeroType zero_;
  const float middle_;
  const int block_shift_;
  const int group_shift_;
};

}  // namespace edgert
