#include "quant/layout.h"

#include <bit>
#include <cstring>

#include "quant/tile.h"

namespace edgert {

TileLayout::TileLayout(const Format& format, std::size_t cols)
    : format_(format),
      parts_(tile_parts(format, cols)),
      scale_bytes_(format.scale == ScaleType::e8m0 ? 1 : 2),
      block_cols_(static_cast<std::size_t>(format.block)),
      block_groups_(static_cast<std::size_t>(format.block / format.group)),
      blocks_(padded_cols(format, cols) / block_cols_) {
  std::size_t offset = 0;
  const unsigned bits = static_cast<unsigned>(format.bits);
  for (unsigned shift = 0; shift < bits;) {
    const unsigned width = std::bit_floor(bits - shift);
    planes_[plane_count_++] = {offset, shift, width};
    offset += blocks_ * block_cols_ * kTileRows * width / 8;
    shift += width;
  }
}

void TileLayout::store_codes(std::byte* tile, std::size_t chunk, const ChunkCodes& codes) const noexcept {
  constexpr std::size_t kQuads = kChunkCols / 4, kWord = sizeof(std::uint64_t);
  for (const Plane& plane : planes()) {
    const std::size_t quads_per_vector = 8 / plane.bits;
    const std::uint64_t mask = each_byte((1U << plane.bits) - 1);
    std::byte* vector = tile + plane.offset + chunk * (kQuads / quads_per_vector) * kVectorBytes;
    for (std::size_t first = 0; first < kQuads; first += quads_per_vector, vector += kVectorBytes) {
      for (std::size_t at = 0; at < kVectorBytes; at += kWord) {
        std::uint64_t merged = 0;
        for (std::size_t i = 0; i < quads_per_vector; ++i) {
          std::uint64_t word;
          std::memcpy(&word, codes.quads[first + i] + at, kWord);
          merged |= ((word >> plane.shift) & mask) << (plane.bits * i);
        }
        store(vector + at, merged);
      }
    }
  }
}

void TileLayout::load_codes(const std::byte* tile, std::size_t block, std::size_t row,
                            std::uint8_t* codes) const noexcept {
  std::memset(codes, 0, block_cols_);
  for (const Plane& plane : planes()) {
    const std::size_t cols_per_vector = 32 / plane.bits;
    const unsigned mask = (1U << plane.bits) - 1;
    const std::byte* quad =
        tile + plane.offset + block * block_cols_ / cols_per_vector * kVectorBytes + 4 * row;
    for (std::size_t first = 0; first < block_cols_; first += cols_per_vector, quad += kVectorBytes) {
      for (std::size_t i = 0; i < cols_per_vector; ++i) {
        const unsigned value =
            std::to_integer<unsigned>(quad[i % 4]) >> (plane.bits * static_cast<unsigned>(i / 4));
        codes[first + i] = static_cast<std::uint8_t>(codes[first + i] | (value & mask) << plane.shift);
      }
    }
  }
}

void TileLayout::store_block(std::byte* tile, std::size_t block,
                             std::span<const BlockRow, kTileRows> rows) const noexcept {
  for (std::size_t chunk = 0; chunk < block_cols_ / kChunkCols; ++chunk) {
    ChunkCodes codes;
    for (std::size_t r = 0; r < kTileRows; ++r) {
      const std::uint8_t* const from = rows[r].codes.data() + chunk * kChunkCols;
      for (std::size_t q = 0; q < kChunkCols / 4; ++q) std::memcpy(codes.quads[q] + 4 * r, from + 4 * q, 4);
    }
    store_codes(tile, block * (block_cols_ / kChunkCols) + chunk, codes);
  }
  for (std::size_t r = 0; r < kTileRows; ++r) store_scales(tile, block, r, rows[r]);
}

void TileLayout::store_scales(std::byte* tile, std::size_t block, std::size_t row,
                              const BlockRow& from) const noexcept {
  const auto u8 = [](auto value) { return static_cast<std::byte>(value); };
  std::byte* const scale = tile + scale_offset(block, row);
  if (scale_bytes_ == 1) *scale = u8(from.scale);
  if (scale_bytes_ == 2) store(scale, from.scale);
  if (format_.has_minima()) store(tile + parts_.zeros + 2 * (block * kTileRows + row), from.minimum);
  for (std::size_t g = 0; g < block_groups_; ++g) {
    const std::size_t at = (block * block_groups_ + g) * kTileRows + row;
    if (format_.scale == ScaleType::i8) tile[parts_.group_scales + at] = u8(from.group_scales[g]);
    if (format_.scale == ScaleType::u4)
      tile[parts_.group_scales + at] = u8(from.group_scales[g] | from.zeros[g] << 4);
    if (format_.scale == ScaleType::u4x2 && g % 2 == 0)
      tile[pair_offset(block, g, row)] = u8(from.group_scales[g] | from.group_scales[g + 1] << 4);
    if (format_.zero == ZeroType::u8) tile[parts_.zeros + at] = u8(from.zeros[g]);
    if (format_.zero == ZeroType::min_u8) tile[parts_.group_minima + at] = u8(from.zeros[g]);
  }
}

void TileLayout::load_block(const std::byte* tile, std::size_t block, std::size_t row,
                            BlockRow& to) const noexcept {
  load_codes(tile, block, row, to.codes.data());
  const std::byte* const scale = tile + scale_offset(block, row);
  to.scale = scale_bytes_ == 1 ? std::to_integer<std::uint16_t>(*scale) : load<std::uint16_t>(scale);
  if (format_.has_minima())
    to.minimum = load<std::uint16_t>(tile + parts_.zeros + 2 * (block * kTileRows + row));
  for (std::size_t g = 0; g < block_groups_; ++g) {
    const std::size_t at = (block * block_groups_ + g) * kTileRows + row;
    if (format_.scale == ScaleType::i8)
      to.group_scales[g] = load<std::int8_t>(tile + parts_.group_scales + at);
    if (format_.scale == ScaleType::u4x2) {
      const auto pair = std::to_integer<unsigned>(tile[pair_offset(block, g, row)]);
      to.group_scales[g] = static_cast<std::int8_t>(g % 2 == 0 ? pair & 15 : pair >> 4);
    }
    if (format_.scale == ScaleType::u4) {
      const auto pair = std::to_integer<unsigned>(tile[parts_.group_scales + at]);
      to.group_scales[g] = static_cast<std::int8_t>(pair & 15);
      to.zeros[g] = static_cast<std::uint8_t>(pair >> 4);
    }
    if (format_.zero == ZeroType::u8) to.zeros[g] = load<std::uint8_t>(tile + parts_.zeros + at);
    if (format_.zero == ZeroType::min_u8) to.zeros[g] = load<std::uint8_t>(tile + parts_.group_minima + at);
  }
}

}  // namespace edgert
