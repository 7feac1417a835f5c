// The search for a group's scale and zero.
//
// Threads: functions without state. The lanes are rows of the matrix and never meet.
#pragma once

#include "quant/format.h"
#include "quant/lanes.h"

namespace edgert {

// One group of four rows, each vector a column.
struct GroupWeights {
  Lanes columns[kMaxGroup];
  int count = 0;
  const Lanes* begin() const noexcept { return columns; }
  const Lanes* end() const noexcept { return columns + count; }
};

// The codes of a group: weight ~ scale * q with q an integer in [lowest, highest], stored as q + zero.
struct GroupFit {
  Lanes scale;  // exact in f16, 0 where every weight is 0
  Lanes inverse;
  Lanes zero;
  Lanes lowest;
  Lanes highest;
  Lanes code(Lanes weight) const { return round(clamp(weight * inverse, lowest, highest)); }
};

// Positive scales to the nearest that f16 holds, at least the smallest.
Lanes to_half(Lanes scale) noexcept;

// The largest magnitude of a weight that a format represents without passing the range of its scale.
float largest_weight(const Format& format) noexcept;

// Scale and zero of the least squared error found; never worse than those of the group's plain range.
// REQUIRES an integer format and |weight| <= largest_weight.
GroupFit fit_group(const Format& format, const GroupWeights& weights) noexcept;

}  // namespace edgert
