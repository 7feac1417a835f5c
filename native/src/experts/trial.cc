#include "experts/trial.h"

#include <algorithm>
#include <cmath>

namespace edgert {

void Trial::step(double seconds) {
  ++steps_;
  if (looking_) {
    if (steps_ > 1) seconds_ += seconds;
    if (steps_ == kWindow) end_window();
  } else if (steps_ == again_) {
    looking_ = true;
    windows_ = 0;
    sum_ = squares_ = 0;
    begin_window();
  }
}

void Trial::begin_window() noexcept {
  const int turn = windows_ % 4;
  on_ = turn == 0 || turn == 3;
  steps_ = 0;
  seconds_ = 0;
}

void Trial::end_window() {
  pair_[on_ ? 1 : 0] = seconds_;
  ++windows_;
  if (windows_ % 2 == 0) {
    const double gain = pair_[0] > 0 ? (pair_[0] - pair_[1]) / pair_[0] : 0;
    sum_ += gain;
    squares_ += gain * gain;
    const int pairs = windows_ / 2;
    const double mean = sum_ / pairs;
    const double error = std::sqrt(std::max(0.0, squares_ / pairs - mean * mean) / std::max(1, pairs - 1));
    if (pairs >= kLeastPairs && std::abs(mean) > kSure * error) return settle(mean > 0);
    if (pairs == kMostPairs) return settle(false);
  }
  begin_window();
}

void Trial::settle(bool on) noexcept {
  again_ = on ? kAgain : std::min(2 * again_, kRarest);
  on_ = on;
  looking_ = false;
  steps_ = 0;
}

}  // namespace edgert
