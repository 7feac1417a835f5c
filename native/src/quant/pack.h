// Packing and unpacking: the only code that writes packed weights.
//
// Threads: functions without state. Deterministic: the same input gives the same bytes on every
// machine (no contraction of multiply and add, fixed order of sums, no dispatch on the processor).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "quant/format.h"
#include "quant/moments.h"

namespace edgert {

enum class SourceType : std::uint8_t { f32, f16, bf16 };
std::size_t source_bytes(SourceType type) noexcept;
SourceType source_type(std::string_view name);  // "f32", "f16" or "bf16"; Error{unsupported} that lists them

// Sums over the elements packed; relative error = sqrt(squared_error / squared_weight).
struct PackReport {
  double squared_error = 0;
  double squared_weight = 0;
  double max_error = 0;
  double weighted_error = 0;  // sum of e M e^T over the rows, where there are moments
  void add(const PackReport& part) noexcept;
};

// Whether a matrix of floats can be packed in this format; the others hold what a file has in them
// (repack.h).
bool packs_floats(const Format& format) noexcept;

// Packs tiles [tile_begin, tile_end) of a row-major matrix [rows, cols]. `source` starts at the first row
// of tile_begin and holds the rows up to tile_end (or the last row); `destination` starts at tile_begin.
// Integer formats search scale and zero of each group for the least squared error, or, given `moments` of the
// matrix's inputs, for the least e M e^T of its rows of errors e: with the whole matrix M columns make up for
// the errors of one another. `remainder`, when not empty, receives (weight - dequantised weight) / scale in
// steps of 1/200, clamped to int8, row-major [rows in these tiles, cols]; integer formats without a codebook
// only. The report is the sum of the tiles' own in their order. Error{unsupported} for a format that does not
// pack floats; Error{invalid_argument} on sizes that disagree, those of the moments too; on NaN, Inf or
// values outside the format it names row and column.
PackReport pack_tiles(const Format& format, SourceType type, std::span<const std::byte> source,
                      std::size_t rows, std::size_t cols, std::size_t tile_begin, std::size_t tile_end,
                      std::span<std::byte> destination, std::span<std::int8_t> remainder = {},
                      const Moments* moments = nullptr);

// All tiles, split over threads: the same bytes and report at any number of them. `threads` counts the
// caller; 0 means usable_cores().
PackReport pack_matrix(const Format& format, SourceType type, std::span<const std::byte> source,
                       std::size_t rows, std::size_t cols, std::span<std::byte> destination,
                       std::span<std::int8_t> remainder, int threads, const Moments* moments = nullptr);

// One row of a packed matrix back to f32; out.size() == cols.
void unpack_row(const Format& format, std::span<const std::byte> packed, std::size_t rows, std::size_t cols,
                std::size_t row, std::span<float> out);

float half_to_float(std::uint16_t bits) noexcept;
std::uint16_t float_to_half(float value) noexcept;  // nearest even
float bfloat_to_float(std::uint16_t bits) noexcept;
std::uint16_t float_to_bfloat(float value) noexcept;  // nearest even

}  // namespace edgert
