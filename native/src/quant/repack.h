// Weights that are quantised already, carried over: codes and scales of a file into tiles, none of them
// changed.
//
// Threads: functions without state. `threads` counts the caller; 0 means usable_cores(). The bytes are the
// same at any number of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "quant/format.h"
#include "quant/ggml.h"

namespace edgert {

// Blocks, row-major, as tiles of the type's format: packed_bytes(format, rows, cols) of them. cols is a
// multiple of the block. Error{invalid_argument} on sizes that disagree, and by row and column for a scale
// that is not a finite number.
void repack(const BlockType& type, std::span<const std::byte> source, std::size_t rows, std::size_t cols,
            std::span<std::byte> destination, int threads);

// Blocks as f32 [rows, cols].
void dequantize(const BlockType& type, std::span<const std::byte> source, std::size_t rows, std::size_t cols,
                std::span<float> weights);

// Codes, scales and zeros as a checkpoint holds them apart; groups = cols / group, rounded up.
struct CodedMatrix {
  std::span<const std::uint8_t> codes;      // [rows, cols]
  std::span<const float> scales;            // [rows, groups], but for e8m0
  std::span<const std::uint8_t> exponents;  // [rows, groups] of e8m0
  std::span<const std::uint8_t> zeros;      // [rows, groups] where the format has zeros
  std::span<const float> minima;            // [rows, groups] where it has minima
};

// REQUIRES the spans that the format does not have to be empty. Error{unsupported} for formats whose scales
// have two levels; Error{invalid_argument} on sizes that disagree, and by row and column for a code that has
// too many bits and for a scale or minimum that the format's type does not hold exactly.
void pack_codes(const Format& format, const CodedMatrix& source, std::size_t rows, std::size_t cols,
                std::span<std::byte> destination, int threads);

}  // namespace edgert
