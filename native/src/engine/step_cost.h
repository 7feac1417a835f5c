// How long a step of so many rows takes, learnt from the steps that were: a fixed part and a part a row.
//
// Threads: one user at a time.
#pragma once

#include <algorithm>

namespace edgert {

class StepCost {
 public:
  void add(double rows, double seconds) noexcept {
    constexpr double kMemory = 0.9;  // what a step weighs after the next one
    for (double* sum : {&n_, &x_, &xx_, &y_, &xy_}) *sum *= kMemory;
    n_ += 1;
    x_ += rows;
    xx_ += rows * rows;
    y_ += seconds;
    xy_ += rows * seconds;
  }

  // Rows that keep a step within `seconds`, but never so few that the fixed part is more than the rows' own
  // (such as experts that are read once a step): that would delay everybody for nothing. 0: nothing is known.
  int rows_within(double seconds) const noexcept {
    if (n_ == 0) return 0;
    const double spread = n_ * xx_ - x_ * x_;
    const double mean = y_ / std::max(x_, 1.0);
    double row = spread > 1e-6 * n_ * xx_ ? (n_ * xy_ - x_ * y_) / spread : mean;
    row = std::clamp(row, mean / 1e3, mean);  // neither part is negative
    const double fixed = std::max(0.0, (y_ - row * x_) / n_);
    return static_cast<int>(std::min(1e6, std::max(seconds - fixed, fixed) / std::max(row, 1e-9)));
  }

 private:
  double n_ = 0, x_ = 0, xx_ = 0, y_ = 0, xy_ = 0;
};

}  // namespace edgert
