// How the tiles of integer formats lie in memory; docs/bundle-format.md draws it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "quant/block.h"
#include "quant/format.h"

namespace edgert {

inline constexpr std::size_t kChunkCols = 32;  // the columns of a vector of the narrowest plane

// Codes of kChunkCols columns: byte 4*r + j of quads[q] is row r, column 4*q + j.
struct ChunkCodes {
  alignas(64) std::uint8_t quads[kChunkCols / 4][4 * kTileRows];
};

// REQUIRES an integer format.
class TileLayout {
 public:
  TileLayout(const Format& format, std::size_t cols);

  std::size_t bytes() const noexcept { return parts_.bytes; }
  std::size_t code_bytes() const noexcept { return parts_.scales; }  // at the beginning; a multiple of 64
  std::size_t blocks() const noexcept { return blocks_; }
  std::size_t scale_offset(std::size_t block, std::size_t row) const noexcept {
    return parts_.scales + scale_bytes_ * (block * kTileRows + row);
  }
  // REQUIRES a format with zeros u8.
  std::size_t zero_offset(std::size_t group, std::size_t row) const noexcept {
    return parts_.zeros + group * kTileRows + row;
  }

  void store_codes(std::byte* tile, std::size_t chunk, const ChunkCodes& codes) const noexcept;

  // The block of every row.
  void store_block(std::byte* tile, std::size_t block,
                   std::span<const BlockRow, kTileRows> rows) const noexcept;
  void store_scales(std::byte* tile, std::size_t block, std::size_t row, const BlockRow& from) const noexcept;
  void load_block(const std::byte* tile, std::size_t block, std::size_t row, BlockRow& to) const noexcept;

 private:
  struct Plane {
    std::size_t offset = 0;
    unsigned shift = 0;  // of the plane's bits in a code
    unsigned bits = 0;
  };
  static constexpr std::size_t kVectorBytes = 64;
  std::span<const Plane> planes() const noexcept { return {planes_.data(), plane_count_}; }
  // Of the byte with the scales of a group and its neighbour.
  std::size_t pair_offset(std::size_t block, std::size_t group, std::size_t row) const noexcept {
    return parts_.group_scales + (block * block_groups_ + group) / 2 * kTileRows + row;
  }
  void load_codes(const std::byte* tile, std::size_t block, std::size_t row,
                  std::uint8_t* codes) const noexcept;

  const Format& format_;
  TileParts parts_;
  std::array<Plane, 3> planes_;
  std::size_t plane_count_ = 0;
  std::size_t scale_bytes_;
  std::size_t block_cols_;
  std::size_t block_groups_;
  std::size_t blocks_;
};

}  // namespace edgert
