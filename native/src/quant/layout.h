// How the tiles of integer formats lie in memory; docs/bundle-format.md draws it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "quant/format.h"

namespace edgert {

// Codes of one group: byte 4*r + j of quads[q] is row r, column 4*q + j.
struct GroupCodes {
  alignas(64) std::uint8_t quads[kMaxGroup / 4][4 * kTileRows];
};

// REQUIRES an integer format.
class TileLayout {
 public:
  TileLayout(const Format& format, std::size_t cols);

  std::size_t bytes() const noexcept { return bytes_; }
  std::size_t groups() const noexcept { return groups_; }
  std::size_t scale_offset(std::size_t group, std::size_t row) const noexcept {
    return scales_ + 2 * (group * kTileRows + row);
  }
  // REQUIRES a format with zeros.
  std::size_t zero_offset(std::size_t group, std::size_t row) const noexcept {
    return zeros_ + group * kTileRows + row;
  }

  void store_codes(std::byte* tile, std::size_t group, const GroupCodes& codes) const noexcept;
  int load_code(const std::byte* tile, std::size_t row, std::size_t col) const noexcept;

 private:
  struct Plane {
    std::size_t offset = 0;
    unsigned shift = 0;  // of the plane's bits in a code
    unsigned bits = 0;
  };
  static constexpr std::size_t kVectorBytes = 64;
  std::span<const Plane> planes() const noexcept { return {planes_.data(), plane_count_}; }

  std::array<Plane, 3> planes_;
  std::size_t plane_count_ = 0;
  std::size_t group_cols_;
  std::size_t groups_;
  std::size_t scales_;
  std::size_t zeros_;
  std::size_t bytes_;
};

}  // namespace edgert
