#include "quant/stretch.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

#include "platform/error.h"
#include "quant/search.h"
#include "quant/tile.h"

namespace edgert {

namespace {

constexpr std::size_t kRows = kTileRows;

// The largest magnitude that the format holds.
float largest_value(const Format& format) noexcept {
  switch (format.id) {
    case FormatId::f32:
      return std::numeric_limits<float>::max();
    case FormatId::f16:
      return 0x1.ffdffep15F;  // what rounds to 65504
    case FormatId::bf16:
      return 0x1.fefffep127F;  // what rounds to the largest bf16
    default:
      return largest_weight(format);
  }
}

[[noreturn]] void refuse(const Format& format, std::size_t row, std::size_t col, float value) {
  std::ostringstream message;
  message << "row " << row << ", column " << col << " is " << value << ": ";
  if (std::isfinite(value)) {
    message << format.name << " holds magnitudes up to " << largest_value(format)
            << "; pack this tensor as f32";
  } else {
    message << "a weight must be a finite number; mend the checkpoint";
  }
  throw Error(ErrorKind::invalid_argument, message.str());
}

}  // namespace

void Stretch::load(const Format& format, SourceType type, const std::byte* source, std::size_t row,
                   std::size_t rows, std::size_t first, std::size_t cols, std::size_t width) {
  const std::size_t present = std::min(kRows, rows - row);
  used_ = std::min(width, cols - first);
  const float largest = largest_value(format);
  for (std::size_t r = 0; r < kRows; ++r) {
    const std::size_t count = r < present ? used_ : 0;
    if (count > 0) read_floats(type, source + (r * cols + first) * source_bytes(type), count, values_[r]);
    std::fill(values_[r] + count, values_[r] + width, 0.0F);
    bool inside = true;
    for (std::size_t c = 0; c < count; ++c) inside &= std::fabs(values_[r][c]) <= largest;  // false for NaN
    if (inside) continue;
    const float* bad = std::find_if_not(values_[r], values_[r] + count,
                                        [largest](float value) { return std::fabs(value) <= largest; });
    refuse(format, row + r, first + static_cast<std::size_t>(bad - values_[r]), *bad);
  }
}

}  // namespace edgert
