// Packed matrices of random weights: for measurements of a model's shape without its checkpoint.
//
// Threads: functions without state. Deterministic: the same arguments give the same bytes on every machine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "quant/format.h"

namespace edgert {

// Fills the packed matrix [rows, cols] with independent weights, uniform over what the codes stand for around
// a mean of zero, whose standard deviation is within 1 % of `deviation`. Integer formats get every code alike
// and one scale. Error{invalid_argument} where the destination has another size, where cols is not a multiple
// of the format's block, and for a deviation that the format's scale does not hold.
void fill_random(const Format& format, std::size_t rows, std::size_t cols, float deviation,
                 std::uint64_t seed, std::span<std::byte> destination);

}  // namespace edgert
