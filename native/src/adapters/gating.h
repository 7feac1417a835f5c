// Which of several adapters a row takes, of one matrix: those whose gates suit its input best.
//
//   share = softmax over the chosen of gate . x / sqrt(n), gate and x standardised (mean 0, deviation 1)
//
// as in PHATGOOSE (arXiv 2402.05859). Sums are in double precision and in one order, so that what a row gets
// depends on that row alone.
//
// Threads: functions without state.
#pragma once

#include <cstddef>
#include <limits>
#include <span>

namespace edgert {

// Numbers brought to mean 0 and deviation 1.
class Standard {
 public:
  explicit Standard(std::span<const float> values);
  double of(float x) const noexcept { return (x - mean_) * scale_; }

 private:
  double mean_ = 0;
  double scale_ = 0;
};

// How well a standardised gate suits an input.
double suits(const float* gate, std::span<const float> x, const Standard& standard) noexcept;

inline constexpr float kNoScore = -std::numeric_limits<float>::infinity();  // of one that cannot be chosen

// Turns scores into shares: of the `top_k` highest, the first ones where they are equal; 0 of the others.
void share(std::span<float> scores, std::size_t top_k) noexcept;

}  // namespace edgert
