// Columns of a tile's 16 rows as floats, checked.
//
// Threads: one thread at a time.
#pragma once

#include <cstddef>

#include "quant/format.h"
#include "quant/pack.h"

namespace edgert {

// A stretch of columns of the 16 rows of a tile as floats, zero where the matrix ends.
class Stretch {
 public:
  static constexpr std::size_t kMaxCols = kMaxGroup;

  // `source` is the first row of the tile, `row` its index. Error{invalid_argument} by row and column for
  // what the format does not hold.
  void load(const Format& format, SourceType type, const std::byte* source, std::size_t row, std::size_t rows,
            std::size_t first, std::size_t cols, std::size_t width);

  const float* row(std::size_t r) const noexcept { return values_[r]; }
  std::size_t used() const noexcept { return used_; }

 private:
  alignas(64) float values_[kTileRows][kMaxCols];
  std::size_t used_ = 0;
};

}  // namespace edgert
