// THE table of weight formats.
//
// A packed matrix [rows, cols] is a sequence of tiles of 16 rows (the last padded with zeros). Columns
// are padded with zeros to a multiple of the group. Within a tile:
//
//   float formats   element[k][16 rows]                                       (f32, f16 or bf16)
//   integer formats codes, then scales f16 [group][16 rows], then, where the format has them, zeros
//                   u8 [group][16 rows]; the tile is padded to a multiple of 64 bytes
//
// Codes are unsigned and lie in bit planes of 2^i bits, the widest plane first (int3 = a plane of the low
// 2 bits, then a plane of the high bit). A plane of b bits is a sequence of 64-byte vectors; each holds
// 16 rows x 32/b columns: byte 4*r + j of a vector carries row r, and its bits [b*i, b*i + b) are the
// column first + 4*i + j, where i runs over 0 .. 8/b - 1. So `(vector >> b*i) & mask` is 16 rows by 4
// columns, the operand of a 4-way dot product.
//
// weight = scale * (code - zero); without a zero type, zero is 2^(bits-1).
// A vector (one dimension) is always plain f32, never tiled.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace edgert {

enum class FormatId : std::uint8_t { f32, f16, bf16, int8, int4, int3, int2 };
enum class ScaleType : std::uint8_t { none, f16 };
enum class ZeroType : std::uint8_t { none, u8 };

struct Format {
  FormatId id;
  std::string_view name;
  int bits;   // of an element or code
  int group;  // columns that share a scale; 1 for float formats
  ScaleType scale;
  ZeroType zero;
  constexpr bool is_float() const noexcept { return scale == ScaleType::none; }
};

inline constexpr int kTileRows = 16;
inline constexpr int kActivationGroup = 32;  // columns that share an activation scale
inline constexpr int kMaxGroup = 64;

std::span<const Format> formats() noexcept;
const Format& format(FormatId id) noexcept;
const Format& format(std::string_view name);  // Error{unsupported} that lists the known names

// Sizes in bytes; Error{invalid_argument} where rows or cols is not in 1 .. 2^31-1 or the size overflows.
std::size_t padded_cols(const Format& format, std::size_t cols);
std::size_t tile_bytes(const Format& format, std::size_t cols);
std::size_t packed_bytes(const Format& format, std::size_t rows, std::size_t cols);
double bits_per_weight(const Format& format) noexcept;  // scales and zeros included

}  // namespace edgert
