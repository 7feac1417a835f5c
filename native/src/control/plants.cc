#include "control/plants.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "platform/error.h"

namespace edgert {
namespace {

double along(const std::vector<std::pair<double, double>>& curve, double u) {
  const auto next = std::ranges::lower_bound(curve, u, {}, &std::pair<double, double>::first);
  if (next == curve.begin()) return curve.front().second;
  if (next == curve.end()) return curve.back().second;
  const auto& [left, from] = *std::prev(next);
  return from + (next->second - from) * (u - left) / (next->first - left);
}

void require(bool holds, const std::string& message) {
  if (!holds) throw Error(ErrorKind::invalid_argument, message);
}

}  // namespace

Plant::Plant(PlantSettings settings) : settings_(std::move(settings)), state_(settings_.initial) {
  const std::string& kind = settings_.curve_kind;
  require(kind == "linear" || kind == "exponential" || kind == "inert" || kind == "table",
          "curve_kind: found " + kind + ", allowed is linear, exponential, inert, table");
  require(kind != "table" || !settings_.curve.empty(), "curve: a table needs points");
  require(std::ranges::is_sorted(settings_.curve, std::less_equal<>{}, &std::pair<double, double>::first) ||
              settings_.curve.size() < 2,
          "curve: u has to ascend");
  require(settings_.slow_weights.size() == settings_.slow_centres.size(),
          "slow_centres: as many as slow_weights, " + std::to_string(settings_.slow_weights.size()));
  require(settings_.delay >= 0 && settings_.delay <= 10000, "delay: 0 to 10000 windows");
  require(settings_.time_constant >= 0, "time_constant: 0 or more windows");
  require(settings_.decade != 0, "decade: not 0");
}

double Plant::steady(double fast, const std::vector<double>& slow) const {
  require(slow.size() == settings_.slow_weights.size(), "slow: found " + std::to_string(slow.size()) +
                                                            " positions, needed are " +
                                                            std::to_string(settings_.slow_weights.size()));
  double u = settings_.fast_weight * (fast - settings_.fast_centre);
  for (std::size_t i = 0; i < slow.size(); ++i)
    u += settings_.slow_weights[i] * (slow[i] - settings_.slow_centres[i]);
  if (settings_.curve_kind == "linear") return settings_.offset + settings_.gain * u;
  if (settings_.curve_kind == "exponential")
    return settings_.offset + settings_.gain * std::pow(10.0, u / settings_.decade);
  if (settings_.curve_kind == "table") return settings_.offset + along(settings_.curve, u);
  return settings_.offset;
}

double Plant::step(double fast, const std::vector<double>& slow, double scale, double added) {
  delayed_.push_back(steady(fast, slow));
  if (delayed_.size() > static_cast<std::size_t>(settings_.delay) + 1) delayed_.pop_front();
  const double target = delayed_.front() * scale + added;
  // Exact for a target that stands during the window.
  const double kept = settings_.time_constant > 0 ? std::exp(-1 / settings_.time_constant) : 0;
  state_ = target + (state_ - target) * kept;
  burst_ /= 2;
  if (slow_before_.size() == slow.size())
    for (std::size_t i = 0; i < slow.size(); ++i)
      burst_ += settings_.burst * std::abs(slow[i] - slow_before_[i]);
  slow_before_ = slow;
  return state_ + burst_;
}

}  // namespace edgert
