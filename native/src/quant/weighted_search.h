// The search for a group's scale and zero where errors of columns are weighed, and columns make up for the
// errors of those before them.
//
// Threads: functions without state. Rows never meet.
#pragma once

#include "quant/rows.h"

namespace edgert {

// A group of columns. Weighed is importance[j] * (error[j] + sum over k < j of feedback[j][k] * error[k])^2.
struct WeightedGroup {
  const Rows* weights;  // [count]
  const Rows* targets;  // [count]: weights plus what makes up for errors before the group
  std::size_t count;
  const float* importance;  // [count]
  const float* feedback;    // [count][stride], or null where columns do not make up for one another
  std::size_t stride;
};

// What the codes of a group stand for: scale * value, the values integers from lowest to highest or those of
// a codebook. A scale is exact in f16, or an integer times the unit of its block; it is 0 where that is best.
struct GroupScale {
  Rows scale;
  Rows inverse;
  Rows zero;  // taken from codes that are integers
  Rows lowest;
  Rows highest;
};

// The value in steps of the scale that is nearest to `weight`.
Lanes nearest_value(const Format& format, const GroupScale& scale, int part, Lanes weight) noexcept;

// The best scale found, and with it the values and errors [count] of the group. `unit` is that of the block,
// or null.
GroupScale fit_weighted(const Format& format, const WeightedGroup& group, const Rows* unit, Rows* values,
                        Rows* errors) noexcept;

// The f16 of a block of groups with small integers for scales, given the largest magnitude in it.
Rows block_unit(const Format& format, const Rows& largest) noexcept;

}  // namespace edgert
