// The patch of a whole packed matrix, for conversion, and as an adapter file keeps it:
//
//   u64 XXH64 of what follows · a PatchTile a tile · PatchEntries, tile after tile · zeros up to 8 bytes
//
// Threads: functions without state.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "adapters/patch.h"

namespace edgert {

// Sparse values of a matrix, each at another element.
struct MatrixDelta {
  std::span<const std::int32_t> rows;
  std::span<const std::int32_t> cols;
  std::span<const float> values;  // or the floats that the weights there were made of
  std::span<const std::int8_t> remainders{};
};

// Both REQUIRE as many numbers of each. Error{unsupported} for a format that takes no patches;
// Error{invalid_argument} names an element that is outside the matrix, not finite, or there twice.
std::vector<std::int8_t> matrix_remainders(const Format& format, std::span<const std::byte> packed,
                                           std::size_t rows, std::size_t cols, const MatrixDelta& floats);
std::vector<std::byte> matrix_patch(const Format& format, std::span<const std::byte> packed, std::size_t rows,
                                    std::size_t cols, const MatrixDelta& delta, PatchCounts& counts);

// Bytes before the entries.
std::size_t patch_header_bytes(std::size_t rows) noexcept;
// Error{corrupt} unless it was stored of a matrix of this shape, and changes nothing but its codes.
void check_patch(const Format& format, std::size_t rows, std::size_t cols, std::span<const std::byte> bytes);

}  // namespace edgert
