// A packed matrix in two planes: a base, which is a packed matrix of fewer bits by itself, and a refinement,
// which with the base makes the very bytes of the whole.
//
// Codes split into high and low bits. The base has the high ones and stands for the middle of what the low
// ones can add: with n low bits, weight = (2^n * scale) * high - scale * (zero - (2^n - 1) / 2). The
// refinement has the low ones, a plane of n bits tile after tile; scales and zeros follow from the base's.
//
// Threads: functions without state.
#pragma once

#include <cstddef>
#include <optional>
#include <span>

#include "quant/format.h"

namespace edgert {

// Of a format that splits; nullopt for others.
std::optional<FormatId> base_format(FormatId format) noexcept;

// REQUIRES a format that splits.
std::size_t refinement_bytes(const Format& format, std::size_t rows, std::size_t cols);

// `base` and `refinement` have exactly their sizes. False where the two would not make `packed` again: a
// scale too large for the base, or a zero beside a scale of 0. REQUIRES a format that splits.
bool split(const Format& format, std::size_t rows, std::size_t cols, std::span<const std::byte> packed,
           std::span<std::byte> base, std::span<std::byte> refinement);

// The whole again, in order of the bytes. `packed` may overlap the refinement where it is written no sooner
// than the refinement has been read. Any bytes are allowed. REQUIRES the same sizes.
void join(const Format& format, std::size_t rows, std::size_t cols, std::span<const std::byte> base,
          std::span<const std::byte> refinement, std::span<std::byte> packed);

}  // namespace edgert
