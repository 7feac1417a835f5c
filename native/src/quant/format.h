// THE table of weight formats.
//
// A packed matrix [rows, cols] is a sequence of tiles of 16 rows (the last padded with zeros). Columns
// are padded with zeros to a multiple of the block. Within a tile:
//
//   float formats   element[k][16 rows]                                       (f32, f16 or bf16)
//   integer formats codes, then the parts that scale and centre them (TileParts), each an array of 16 rows
//   for
//                   every group or block; the tile is padded to a multiple of 64 bytes
//
// Codes are unsigned and lie in bit planes of 2^i bits, the widest plane first (int3 = a plane of the low
// 2 bits, then a plane of the high bit). A plane of b bits is a sequence of 64-byte vectors; each holds
// 16 rows x 32/b columns: byte 4*r + j of a vector carries row r, and its bits [b*i, b*i + b) are the
// column first + 4*i + j, where i runs over 0 .. 8/b - 1. So `(vector >> b*i) & mask` is 16 rows by 4
// columns, the operand of a 4-way dot product.
//
// In f32, each operation rounded by itself:
//   weight = scale * (code - zero)    without a zero, zero is 2^(bits-1)
//   weight = scale * code - minimum   where the format has minima
//   weight = scale * value of code    where it has a codebook
// A scale or minimum that is a small integer is that integer times the block's f16.
// A vector (one dimension) is always plain f32, never tiled.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace edgert {

enum class FormatId : std::uint8_t {
  f32,
  f16,
  bf16,
  int8,
  int4,
  int3,
  int2,
  int4_32,
  q4_0,
  q4_1,
  q5_0,
  q5_1,
  q2_k,
  q3_k,
  q4_k,
  q5_k,
  q6_k,
  iq4_nl,
  iq4_xs,
  mxfp4,
  affine2,
  affine3,
  affine4,
  affine5,
  affine6,
  affine8,
  affine2_32,
  affine3_32,
  affine6_32,
  affine8_32,
  nl2,
  nl2_16,
  nl3,
  nl3_16,
  nl4,
  nl4_16,
};
enum class ScaleType : std::uint8_t {
  none,
  f16,
  e8m0,  // 2^(code - 127); with the codebook e2m1, whose values are doubled, 2^(code - 128)
  i8,    // times the block's f16
  u4,    // times the block's f16; the low half of a byte whose high half is the minimum's
  u4x2,  // times the block's f16; the low half of a byte whose high half is the next group's
};
enum class ZeroType : std::uint8_t {
  none,
  u8,
  min_f16,
  min_u8,  // times the block's f16
  min_u4,  // times the block's f16; the high half of the scale's byte
};
enum class Codebook : std::uint8_t { none, iq4_nl, e2m1, nl2, nl3, nl4 };

struct Format {
  FormatId id;
  std::string_view name;
  int bits;   // of an element or code
  int group;  // columns that share a scale; 1 for float formats
  ScaleType scale;
  ZeroType zero;
  Codebook codebook = Codebook::none;
  int block = group;  // columns that share the f16 of scales that are integers, else the group

  constexpr bool is_float() const noexcept { return scale == ScaleType::none; }
  constexpr bool has_blocks() const noexcept { return block != group; }
  constexpr bool has_minima() const noexcept { return zero >= ZeroType::min_f16; }
};

inline constexpr std::array kFormats{
    Format{FormatId::f32, "f32", 32, 1, ScaleType::none, ZeroType::none},
    Format{FormatId::f16, "f16", 16, 1, ScaleType::none, ZeroType::none},
    Format{FormatId::bf16, "bf16", 16, 1, ScaleType::none, ZeroType::none},
    Format{FormatId::int8, "int8", 8, 32, ScaleType::f16, ZeroType::none},
    Format{FormatId::int4, "int4", 4, 64, ScaleType::f16, ZeroType::u8},
    Format{FormatId::int3, "int3", 3, 64, ScaleType::f16, ZeroType::u8},
    Format{FormatId::int2, "int2", 2, 32, ScaleType::f16, ZeroType::u8},
    Format{FormatId::int4_32, "int4_32", 4, 32, ScaleType::f16, ZeroType::u8},
    Format{FormatId::q4_0, "q4_0", 4, 32, ScaleType::f16, ZeroType::none},
    Format{FormatId::q4_1, "q4_1", 4, 32, ScaleType::f16, ZeroType::min_f16},
    Format{FormatId::q5_0, "q5_0", 5, 32, ScaleType::f16, ZeroType::none},
    Format{FormatId::q5_1, "q5_1", 5, 32, ScaleType::f16, ZeroType::min_f16},
    Format{FormatId::q2_k, "q2_k", 2, 16, ScaleType::u4, ZeroType::min_u4, Codebook::none, 256},
    Format{FormatId::q3_k, "q3_k", 3, 16, ScaleType::i8, ZeroType::none, Codebook::none, 256},
    Format{FormatId::q4_k, "q4_k", 4, 32, ScaleType::i8, ZeroType::min_u8, Codebook::none, 256},
    Format{FormatId::q5_k, "q5_k", 5, 32, ScaleType::i8, ZeroType::min_u8, Codebook::none, 256},
    Format{FormatId::q6_k, "q6_k", 6, 16, ScaleType::i8, ZeroType::none, Codebook::none, 256},
    Format{FormatId::iq4_nl, "iq4_nl", 4, 32, ScaleType::f16, ZeroType::none, Codebook::iq4_nl},
    Format{FormatId::iq4_xs, "iq4_xs", 4, 32, ScaleType::i8, ZeroType::none, Codebook::iq4_nl, 256},
    Format{FormatId::mxfp4, "mxfp4", 4, 32, ScaleType::e8m0, ZeroType::none, Codebook::e2m1},
    Format{FormatId::affine2, "affine2", 2, 64, ScaleType::f16, ZeroType::min_f16},
    Format{FormatId::affine3, "affine3", 3, 64, ScaleType::f16, ZeroType::min_f16},
    Format{FormatId::affine4, "affine4", 4, 64, ScaleType::f16, ZeroType::min_f16},
    Format{FormatId::affine5, "affine5", 5, 64, ScaleType::f16, ZeroType::min_f16},
    Format{FormatId::affine6, "affine6", 6, 64, ScaleType::f16, ZeroType::min_f16},
    Format{FormatId::affine8, "affine8", 8, 64, ScaleType::f16, ZeroType::min_f16},
    Format{FormatId::affine2_32, "affine2_32", 2, 32, ScaleType::f16, ZeroType::min_f16},
    Format{FormatId::affine3_32, "affine3_32", 3, 32, ScaleType::f16, ZeroType::min_f16},
    Format{FormatId::affine6_32, "affine6_32", 6, 32, ScaleType::f16, ZeroType::min_f16},
    Format{FormatId::affine8_32, "affine8_32", 8, 32, ScaleType::f16, ZeroType::min_f16},
    Format{FormatId::nl2, "nl2", 2, 256, ScaleType::f16, ZeroType::none, Codebook::nl2},
    Format{FormatId::nl2_16, "nl2_16", 2, 16, ScaleType::u4x2, ZeroType::none, Codebook::nl2, 256},
    Format{FormatId::nl3, "nl3", 3, 128, ScaleType::f16, ZeroType::none, Codebook::nl3},
    Format{FormatId::nl3_16, "nl3_16", 3, 16, ScaleType::u4x2, ZeroType::none, Codebook::nl3, 256},
    Format{FormatId::nl4, "nl4", 4, 128, ScaleType::f16, ZeroType::none, Codebook::nl4},
    Format{FormatId::nl4_16, "nl4_16", 4, 16, ScaleType::u4x2, ZeroType::none, Codebook::nl4, 256},
};

// What the codes of a codebook stand for; e2m1 doubled, so that its values are integers. nl2, nl3 and nl4
// ascend: the values of least squared error for normally distributed weights (Lloyd and Max), as small
// integers.
using CodebookValues = std::array<std::int8_t, 16>;
constexpr CodebookValues codebook_values(Codebook codebook) noexcept {
  if (codebook == Codebook::iq4_nl) {
    return {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  }
  if (codebook == Codebook::e2m1) return {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  if (codebook == Codebook::nl2) return {-10, -3, 3, 10};
  if (codebook == Codebook::nl3) return {-18, -11, -6, -2, 2, 6, 11, 18};
  if (codebook == Codebook::nl4) return {-64, -48, -38, -29, -22, -15, -9, -3, 3, 9, 15, 22, 29, 38, 48, 64};
  return {};
}

inline constexpr int kTileRows = 16;
inline constexpr int kActivationGroup = 32;  // columns that share an activation scale
inline constexpr int kMaxGroup = 256;        // columns of the largest group or block

constexpr std::span<const Format> formats() noexcept { return kFormats; }
constexpr const Format& format(FormatId id) noexcept { return kFormats[static_cast<std::size_t>(id)]; }
const Format& format(std::string_view name);  // Error{unsupported} that lists the known names

// Where the parts of an integer format's tile begin, in bytes; parts that the format lacks are empty. They
// lie in this order.
struct TileParts {
  std::size_t codes = 0;
  std::size_t scales = 0;        // f16 or e8m0 [block][16]
  std::size_t group_scales = 0;  // i8, or u4 under a minimum's u4 [group][16], or u4x2 [two groups][16]
  std::size_t zeros = 0;         // u8, or minima f16 [block][16]
  std::size_t group_minima = 0;  // u8 [group][16]
  std::size_t bytes = 0;
};

// Sizes in bytes; Error{invalid_argument} where rows or cols is not in 1 .. 2^31-1 or the size overflows.
std::size_t padded_cols(const Format& format, std::size_t cols);
TileParts tile_parts(const Format& format, std::size_t cols);
std::size_t tile_bytes(const Format& format, std::size_t cols);
std::size_t packed_bytes(const Format& format, std::size_t rows, std::size_t cols);
double bits_per_weight(const Format& format) noexcept;  // scales and zeros included

}  // namespace edgert
