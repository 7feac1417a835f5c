#include "quant/layout.h"

#include <bit>

namespace edgert {

TileLayout::TileLayout(const Format& format, std::size_t cols)
    : group_cols_(static_cast<std::size_t>(format.group)),
      groups_(padded_cols(format, cols) / group_cols_),
      bytes_(tile_bytes(format, cols)) {
  std::size_t offset = 0;
  const unsigned bits = static_cast<unsigned>(format.bits);
  for (unsigned shift = 0; shift < bits;) {
    const unsigned width = std::bit_floor(bits - shift);
    planes_[plane_count_++] = {offset, shift, width};
    offset += groups_ * group_cols_ * kTileRows * width / 8;
    shift += width;
  }
  scales_ = offset;
  zeros_ = scales_ + 2 * groups_ * kTileRows;
}

void TileLayout::store_codes(std::byte* tile, std::size_t group, const GroupCodes& codes) const noexcept {
  const std::size_t quads = group_cols_ / 4;
  for (const Plane& plane : planes()) {
    const std::size_t quads_per_vector = 8 / plane.bits;
    const unsigned mask = (1U << plane.bits) - 1;
    std::byte* vector = tile + plane.offset + group * quads / quads_per_vector * kVectorBytes;
    for (std::size_t first = 0; first < quads; first += quads_per_vector, vector += kVectorBytes) {
      std::uint8_t merged[kVectorBytes] = {};
      for (std::size_t i = 0; i < quads_per_vector; ++i) {
        const unsigned lift = plane.bits * static_cast<unsigned>(i);
        for (std::size_t at = 0; at < kVectorBytes; ++at) {
          const unsigned code = codes.quads[first + i][at];
          merged[at] = static_cast<std::uint8_t>(merged[at] | (((code >> plane.shift) & mask) << lift));
        }
      }
      for (std::size_t at = 0; at < kVectorBytes; ++at) vector[at] = std::byte{merged[at]};
    }
  }
}

int TileLayout::load_code(const std::byte* tile, std::size_t row, std::size_t col) const noexcept {
  unsigned code = 0;
  for (const Plane& plane : planes()) {
    const std::size_t cols_per_vector = 32 / plane.bits;
    const std::size_t within = col % cols_per_vector;
    const std::byte byte = tile[plane.offset + col / cols_per_vector * kVectorBytes + 4 * row + within % 4];
    const unsigned value =
        std::to_integer<unsigned>(byte) >> (plane.bits * static_cast<unsigned>(within / 4));
    code |= (value & ((1U << plane.bits) - 1)) << plane.shift;
  }
  return static_cast<int>(code);
}

}  // namespace edgert
