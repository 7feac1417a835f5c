#include "quant/format.h"

#include <array>
#include <bit>
#include <string>

#include "platform/error.h"

namespace edgert {

static_assert(std::endian::native == std::endian::little, "packed weights are read as they lie in the file");

namespace {

constexpr std::array kFormats{
    Format{FormatId::f32, "f32", 32, 1, ScaleType::none, ZeroType::none},
    Format{FormatId::f16, "f16", 16, 1, ScaleType::none, ZeroType::none},
    Format{FormatId::bf16, "bf16", 16, 1, ScaleType::none, ZeroType::none},
    Format{FormatId::int8, "int8", 8, 32, ScaleType::f16, ZeroType::none},
    Format{FormatId::int4, "int4", 4, 64, ScaleType::f16, ZeroType::u8},
    Format{FormatId::int3, "int3", 3, 64, ScaleType::f16, ZeroType::u8},
    Format{FormatId::int2, "int2", 2, 32, ScaleType::f16, ZeroType::u8},
};

constexpr bool rows_match_ids() {
  for (std::size_t i = 0; i < kFormats.size(); ++i) {
    if (static_cast<std::size_t>(kFormats[i].id) != i || kFormats[i].group > kMaxGroup) return false;
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

// Scales and zeros of 16 rows of one group.
constexpr std::size_t group_overhead(const Format& format) {
  return kTileRows * ((format.scale == ScaleType::f16 ? 2U : 0U) + (format.zero == ZeroType::u8 ? 1U : 0U));
}

}  // namespace

std::span<const Format> formats() noexcept { return kFormats; }

const Format& format(FormatId id) noexcept { return kFormats[static_cast<std::size_t>(id)]; }

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
  return round_to(cols, static_cast<std::size_t>(format.group));
}

std::size_t tile_bytes(const Format& format, std::size_t cols) {
  const std::size_t padded = padded_cols(format, cols);
  const std::size_t codes = padded * kTileRows * static_cast<std::size_t>(format.bits) / 8;
  const std::size_t groups = padded / static_cast<std::size_t>(format.group);
  return round_to(codes + groups * group_overhead(format), kTileAlignment);
}

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
  return format.bits + 8.0 * static_cast<double>(group_overhead(format)) / (kTileRows * format.group);
}

}  // namespace edgert
