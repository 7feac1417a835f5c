#include "quant/format.h"

#include <bit>
#include <string>

#include "platform/error.h"

namespace edgert {

static_assert(std::endian::native == std::endian::little, "packed weights are read as they lie in the file");

namespace {

constexpr bool rows_match_ids() {
  for (std::size_t i = 0; i < kFormats.size(); ++i) {
    const Format& row = kFormats[i];
    if (static_cast<std::size_t>(row.id) != i || kMaxGroup % row.block != 0 || row.block % row.group != 0)
      return false;
  }
  return true;
}
static_assert(rows_match_ids());

constexpr std::size_t kTileAlignment = 64;
constexpr std::size_t kMaxExtent = (std::size_t{1} << 31) - 1;

void check_extent(const char* what, std::size_t n) {
  if (n >= 1 && n <= kMaxExtent) return;
  throw Error(ErrorKind::invalid_argument, "a packed matrix with " + std::to_string(n) + " " + what +
                                               ": allowed are 1 to " + std::to_string(kMaxExtent));
}

constexpr std::size_t round_to(std::size_t n, std::size_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Bytes for one row: of a block's scale and zero or minimum, and of those of each group in it.
struct Overhead {
  std::size_t scale, group_scale, zero, group_minimum;
  std::size_t groups_a_scale = 1;  // that share the bytes of a group's scale
};

constexpr Overhead overhead(const Format& format) {
  Overhead bytes{};
  bytes.scale = format.scale == ScaleType::none ? 0 : format.scale == ScaleType::e8m0 ? 1 : 2;
  bytes.group_scale = format.has_blocks() ? 1 : 0;
  if (format.scale == ScaleType::u4x2) bytes.groups_a_scale = 2;
  bytes.zero = format.zero == ZeroType::none ? 0 : format.zero == ZeroType::u8 ? 1 : 2;
  bytes.group_minimum = format.zero == ZeroType::min_u8 ? 1 : 0;
  return bytes;
}

}  // namespace

const Format& format(std::string_view name) {
  std::string known;
  for (const Format& row : kFormats) {
    if (row.name == name) return row;
    known += known.empty() ? "" : ", ";
    known += row.name;
  }
  throw Error(ErrorKind::unsupported,
              "weight format '" + std::string(name) + "' is unknown; known are " + known);
}

std::size_t padded_cols(const Format& format, std::size_t cols) {
  check_extent("columns", cols);
  return round_to(cols, static_cast<std::size_t>(format.block));
}

TileParts tile_parts(const Format& format, std::size_t cols) {
  const std::size_t padded = padded_cols(format, cols);
  const std::size_t groups = padded / static_cast<std::size_t>(format.group) * kTileRows;
  const std::size_t blocks = padded / static_cast<std::size_t>(format.block) * kTileRows;
  const Overhead each = overhead(format);
  TileParts parts;
  parts.scales = padded * kTileRows * static_cast<std::size_t>(format.bits) / 8;
  parts.group_scales = parts.scales + blocks * each.scale;
  parts.zeros = parts.group_scales + groups * each.group_scale / each.groups_a_scale;
  parts.group_minima = parts.zeros + blocks * each.zero;
  parts.bytes = round_to(parts.group_minima + groups * each.group_minimum, kTileAlignment);
  return parts;
}

std::size_t tile_bytes(const Format& format, std::size_t cols) { return tile_parts(format, cols).bytes; }

std::size_t packed_bytes(const Format& format, std::size_t rows, std::size_t cols) {
  check_extent("rows", rows);
  const std::size_t tiles = round_to(rows, kTileRows) / kTileRows;
  std::size_t bytes = 0;
  if (__builtin_mul_overflow(tiles, tile_bytes(format, cols), &bytes)) {
    throw Error(ErrorKind::invalid_argument, "a packed matrix of " + std::to_string(rows) + " x " +
                                                 std::to_string(cols) + " does not fit in the address space");
  }
  return bytes;
}

double bits_per_weight(const Format& format) noexcept {
  const Overhead each = overhead(format);
  return format.bits + 8.0 * static_cast<double>(each.scale + each.zero) / format.block +
         8.0 * static_cast<double>(each.group_scale) / static_cast<double>(each.groups_a_scale) /
             format.group +
         8.0 * static_cast<double>(each.group_minimum) / format.group;
}

}  // namespace edgert
