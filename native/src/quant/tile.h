// One tile of a packed matrix.
//
// Threads: functions without state.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "quant/layout.h"
#include "quant/moments.h"
#include "quant/pack.h"
#include "quant/rows.h"

namespace edgert {

struct TileTask {
  const Format& format;
  SourceType type;
  std::size_t rows;  // of the matrix
  std::size_t cols;
  const Moments* moments = nullptr;  // of its inputs, where they are known
};

// Packs the tile that begins at `row`. `source` and `remainder` (may be null) begin at that row, `tile` is
// zeroed. Error{invalid_argument} as pack_tiles says.
PackReport pack_tile(const TileTask& task, const std::byte* source, std::size_t row, std::byte* tile,
                     std::int8_t* remainder);

// The same for an integer format whose errors moments weigh, and for one with a codebook.
PackReport pack_weighted_tile(const TileTask& task, const TileLayout& layout, const std::byte* source,
                              std::size_t row, std::byte* tile, std::int8_t* remainder);

// Sum of e M e^T over the 16 rows of `errors` [moments.cols()].
double weighted_error(const Moments& moments, const Rows* errors) noexcept;

// `count` consecutive elements, unaligned.
void read_floats(SourceType type, const std::byte* from, std::size_t count, float* to) noexcept;

// Error{invalid_argument} unless a buffer has the bytes that it needs.
void check_bytes(const char* what, std::size_t found, std::size_t wanted);

// Eight bytes that compute as one word.
constexpr std::uint64_t each_byte(unsigned value) noexcept { return 0x0101010101010101U * value; }

template <typename T>
T load(const std::byte* from) noexcept {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <typename T>
void store(std::byte* to, T value) noexcept {
  std::memcpy(to, &value, sizeof value);
}

}  // namespace edgert
