// Plants to try controllers on: a signal that follows the knobs through a static curve, a delay and a
// first-order lag.
//
// Contract: deterministic; one thread at a time. All figures made with them are simulated.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <utility>
#include <vector>

namespace edgert {

struct PlantSettings {
  // linear: offset + gain * u; exponential: offset + gain * 10^(u / decade); inert: offset; table: `curve` at
  // u, between its points on a line, beyond them as at the end. u = fast - fast_centre + sum of slow_weight *
  // (slow - its centre).
  std::string curve_kind = "linear";
  double offset = 0;
  double gain = 1;
  double decade = 1;  // units of u for a factor of ten
  std::vector<std::pair<double, double>>
      curve;  // (u, signal), u ascending: such as misses over slots of an LRU
  double fast_weight = 1;
  double fast_centre = 0;
  std::vector<double> slow_weights;
  std::vector<double> slow_centres;
  std::int64_t delay = 0;    // windows
  double time_constant = 0;  // windows; 0 follows at once
  double initial = 0;        // the signal before the first window
  double burst = 0;  // added in the window after a slow move, for each unit moved; halves with each window
};

class Plant {
 public:
  explicit Plant(PlantSettings settings);  // Error{invalid_argument} by field
  // The signal at the end of a window in which the knobs stood so; the curve's value is scaled and then added
  // to.
  double step(double fast, const std::vector<double>& slow, double scale = 1, double added = 0);
  double steady(double fast, const std::vector<double>& slow) const;  // the curve

 private:
  PlantSettings settings_;
  std::deque<double> delayed_;
  std::vector<double> slow_before_;
  double state_;
  double burst_ = 0;
};

}  // namespace edgert
