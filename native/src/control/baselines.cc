#include "control/baselines.h"

#include <algorithm>
#include <cmath>

namespace edgert {
namespace {

// How far the knobs that a baseline drives can go from their start, in its units: (towards tight, towards
// open).
std::pair<double, double> travel(const ControlSettings& settings) {
  if (settings.drives == "fast") {
    const auto below = static_cast<double>(settings.fast.start - settings.fast.minimum);
    const auto above = static_cast<double>(settings.fast.maximum - settings.fast.start);
    return settings.fast.step > 0 ? std::pair(below, above) : std::pair(above, below);
  }
  double tight = 0, open = 0;
  for (const Actuator& actuator : settings.slow) {
    const auto step = static_cast<double>(std::abs(actuator.step));
    const double below = std::ceil(static_cast<double>(actuator.start - actuator.minimum) / step);
    const double above = std::ceil(static_cast<double>(actuator.maximum - actuator.start) / step);
    tight = std::max(tight, actuator.step > 0 ? below : above);
    open = std::max(open, actuator.step > 0 ? above : below);
  }
  return {tight, open};
}

bool missing(const ControlSettings& settings, const Signal& signal) {
  return signal.quality == SignalQuality::missing || !std::isfinite(signal.value) ||
         !(signal.age <= settings.max_age);
}

Reason where(const ControlSettings& settings, double value) {
  return value < settings.low ? Reason::below : value > settings.high ? Reason::above : Reason::in_band;
}

// Places what the baseline drives at this distance from its start, positive towards open.
Decision place(const ControlSettings& settings, Positions& positions, double offset, Decision decision) {
  const std::int64_t before = positions.fast();
  const auto units = static_cast<std::int64_t>(std::lround(offset));
  bool moved = false;
  if (settings.drives == "fast") {
    const std::int64_t stood =
        settings.fast.step > 0 ? before - settings.fast.start : settings.fast.start - before;
    moved = positions.move_fast(units - stood);
    decision.direction = moved ? (units > stood) - (units < stood) : 0;
  } else {
    moved = positions.place_slow(units);
  }
  decision.action = !moved ? Action::hold : settings.drives == "fast" ? Action::fast : Action::slow;
  decision.fast = positions.fast();
  decision.slow = positions.slow();
  return decision;
}

}  // namespace

Decision Fixed::step(const Signal& signal) {
  return {.window = window_++,
          .signal = signal,
          .fast = positions_.fast(),
          .slow = positions_.slow(),
          .reason = where(settings_, signal.value)};
}

Aimd::Aimd(ControlSettings settings) : settings_(std::move(settings)), positions_(settings_) {
  const auto [tight, open] = travel(settings_);
  most_ = tight + open;
  start_ = coordinate_ = tight;
}

Decision Aimd::step(const Signal& signal) {
  Decision decision{.window = window_++, .signal = signal, .reason = Reason::missing};
  if (!missing(settings_, signal)) {
    decision.reason = where(settings_, signal.value);
    const bool above = decision.reason == Reason::above;
    coordinate_ =
        above ? coordinate_ * settings_.decrease : std::min(most_, coordinate_ + settings_.increase);
  }
  return place(settings_, positions_, coordinate_ - start_, std::move(decision));
}

Pi::Pi(ControlSettings settings) : settings_(std::move(settings)), positions_(settings_) {
  const auto [tight, open] = travel(settings_);
  least_ = -tight;
  most_ = open;
}

Decision Pi::step(const Signal& signal) {
  Decision decision{.window = window_++, .signal = signal, .reason = Reason::missing};
  double error = 0;
  if (!missing(settings_, signal)) {
    decision.reason = where(settings_, signal.value);
    error = ((settings_.low + settings_.high) / 2 - signal.value) / (settings_.high - settings_.low);
  } else {
    return place(settings_, positions_, std::clamp(integral_, least_, most_), std::move(decision));
  }
  const double added = settings_.integral * error;
  const double output = settings_.proportional * error + integral_ + added;
  const bool pushes = (output > most_ && added > 0) || (output < least_ && added < 0);
  if (!pushes) integral_ += added;
  const double wanted = std::clamp(settings_.proportional * error + integral_, least_, most_);
  return place(settings_, positions_, wanted, std::move(decision));
}

void Fixed::exchange(State& state) {
  positions_.exchange(state);
  state(window_);
}

void Aimd::exchange(State& state) {
  positions_.exchange(state);
  state(window_);
  state(coordinate_);
}

void Pi::exchange(State& state) {
  positions_.exchange(state);
  state(window_);
  state(integral_);
}

}  // namespace edgert
