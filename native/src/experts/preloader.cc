#include "experts/preloader.h"

#include <chrono>

namespace edgert {
namespace {

double steady_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

Preloader::Preloader(ExpertStore& store, Lookahead lookahead, std::vector<int> layers, Clock clock)
    : store_(store),
      lookahead_(std::move(lookahead)),
      layers_(std::move(layers)),
      clock_(clock ? std::move(clock) : Clock(steady_seconds)) {}

void Preloader::begin_step() {
  const std::lock_guard lock(mutex_);
  reads_ = forced_.value_or(trial_.on());
  began_ = clock_();
}

void Preloader::routed(const Sight& sight) {
  lookahead_.routed(sight);
  const auto expected = lookahead_.expected();
  if (expected.empty()) return;
  const int layer = layers_[static_cast<std::size_t>(sight.row) + 1];
  store_.expect(layer, expected);
  if (reads_) store_.preload(layer);
}

void Preloader::end_step() {
  const std::lock_guard lock(mutex_);
  if (!forced_) trial_.step(clock_() - began_);
  ++statistics_.steps;
  statistics_.steps_on += reads_ ? 1 : 0;
  statistics_.expected = lookahead_.counts().expected;
  statistics_.used = lookahead_.counts().used;
}

void Preloader::force(std::optional<bool> on) {
  const std::lock_guard lock(mutex_);
  forced_ = on;
}

PreloadStatistics Preloader::statistics() const {
  const std::lock_guard lock(mutex_);
  PreloadStatistics out = statistics_;
  out.on = forced_.value_or(trial_.on());
  return out;
}

}  // namespace edgert
