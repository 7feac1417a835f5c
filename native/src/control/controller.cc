#include "control/controller.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>

#include "control/baselines.h"
#include "control/fast_slow.h"
#include "platform/error.h"

namespace edgert {
namespace {

constexpr std::array<std::string_view, 4> kActions = {"hold", "fast", "slow", "recentre"};
constexpr std::array<std::string_view, 11> kReasons = {"in-band",     "below",    "above", "missing",
                                                       "lower-bound", "blanking", "rail",  "dwell",
                                                       "exhausted",   "hunting",  "safety"};
constexpr std::array<std::string_view, 3> kQualities = {"exact", "at-least", "missing"};
constexpr std::int64_t kMost = std::int64_t{1} << 48;  // no sum of positions overflows

void refuse(const std::string& field, const std::string& found, const std::string& allowed) {
  throw Error(ErrorKind::invalid_argument, field + ": found " + found + ", allowed is " + allowed);
}

void check(const Actuator& actuator, const std::string& field) {
  const auto range = std::to_string(actuator.minimum) + " to " + std::to_string(actuator.maximum);
  if (actuator.minimum > actuator.maximum)
    refuse(field + ".maximum", std::to_string(actuator.maximum), "its minimum or more");
  if (actuator.minimum < -kMost || actuator.maximum > kMost)
    refuse(field + ".minimum to maximum", range, "up to 2^48");
  if (actuator.start < actuator.minimum || actuator.start > actuator.maximum)
    refuse(field + ".start", std::to_string(actuator.start), range);
  if (actuator.step == 0 || actuator.step > kMost || actuator.step < -kMost)
    refuse(field + ".step", std::to_string(actuator.step), "not 0, up to 2^48");
}

void check(const ControlSettings& settings) {
  if (!std::isfinite(settings.low) || !std::isfinite(settings.high) || settings.low >= settings.high)
    refuse("high", std::to_string(settings.high),
           "finite and more than low, " + std::to_string(settings.low));
  check(settings.fast, "fast");
  for (const Actuator& actuator : settings.slow) check(actuator, "slow " + actuator.name);
  const auto at_least = [](const char* field, double found, double least) {
    if (!(found >= least) || found > static_cast<double>(kMost))
      refuse(field, std::to_string(found), std::to_string(least) + " or more");
  };
  at_least("patience", static_cast<double>(settings.patience), 1);
  at_least("blanking", static_cast<double>(settings.blanking), 0);
  at_least("dwell", static_cast<double>(settings.dwell), static_cast<double>(settings.blanking));
  at_least("relief", static_cast<double>(settings.relief), 0);
  at_least("slow_gain", settings.slow_gain, 0);
  at_least("hysteresis", settings.hysteresis, 1);
  at_least("lead", settings.lead, 0);
  if (!(settings.max_age > 0)) refuse("max_age", std::to_string(settings.max_age), "more than 0");
  if (settings.drives != "fast" && settings.drives != "slow") refuse("drives", settings.drives, "fast, slow");
  at_least("increase", settings.increase, 0);
  if (!(settings.decrease >= 0 && settings.decrease <= 1))
    refuse("decrease", std::to_string(settings.decrease), "0 to 1");
  at_least("proportional", settings.proportional, 0);
  at_least("integral", settings.integral, 0);
}

bool can_move(const Actuator& actuator, std::int64_t position, std::int64_t direction) {
  return direction * actuator.step > 0 ? position < actuator.maximum : position > actuator.minimum;
}

bool add(const Actuator& actuator, std::int64_t& position, std::int64_t change) {
  const std::int64_t before = position;
  position =
      std::clamp(position + std::clamp(change, -2 * kMost, 2 * kMost), actuator.minimum, actuator.maximum);
  return position != before;
}

}  // namespace

std::unique_ptr<Controller> make_controller(std::string_view kind, ControlSettings settings) {
  check(settings);
  if (kind == "fast-slow") return std::make_unique<FastSlow>(std::move(settings));
  if (kind == "published") return std::make_unique<PublishedLaw>(std::move(settings));
  if (kind == "fixed") return std::make_unique<Fixed>(std::move(settings));
  if (kind == "aimd") return std::make_unique<Aimd>(std::move(settings));
  if (kind == "pi") return std::make_unique<Pi>(std::move(settings));
  refuse("kind", std::string(kind), "fast-slow, published, fixed, aimd, pi");
  return nullptr;
}

std::string_view name(Action action) noexcept { return kActions[static_cast<std::size_t>(action)]; }
std::string_view name(Reason reason) noexcept { return kReasons[static_cast<std::size_t>(reason)]; }
std::string_view name(SignalQuality quality) noexcept {
  return kQualities[static_cast<std::size_t>(quality)];
}

SignalQuality signal_quality(std::string_view word) {
  const auto found = std::ranges::find(kQualities, word);
  if (found == kQualities.end()) refuse("quality", std::string(word), "exact, at-least, missing");
  return static_cast<SignalQuality>(found - kQualities.begin());
}

void State::operator()(double& field) {
  if (!read_) {
    numbers_.push_back(field);
    return;
  }
  if (at_ == numbers_.size() || !std::isfinite(numbers_[at_]))
    refuse("state, number " + std::to_string(at_), at_ == numbers_.size() ? "none" : "no finite one",
           "what state() gave");
  field = numbers_[at_++];
}

void State::operator()(std::int64_t& field) {
  auto number = static_cast<double>(field);
  (*this)(number);
  if (std::abs(number) > 16.0 * kMost || number != std::trunc(number))
    refuse("state, number " + std::to_string(at_ - 1), std::to_string(number), "a whole one up to 2^52");
  field = static_cast<std::int64_t>(number);
}

void State::operator()(std::uint64_t& field) {
  auto number = static_cast<std::int64_t>(field);
  (*this)(number);
  field = static_cast<std::uint64_t>(std::max<std::int64_t>(0, number));
}

void State::done() const {
  if (at_ != numbers_.size())
    refuse("state", std::to_string(numbers_.size()) + " numbers", std::to_string(at_));
}

std::vector<double> Controller::state() {
  State state;
  exchange(state);
  return state.numbers();
}

void Controller::restore(std::vector<double> numbers) {
  State state(std::move(numbers));
  exchange(state);
  state.done();
}

Positions::Positions(const ControlSettings& settings) : settings_(settings), fast_(settings.fast.start) {
  for (const Actuator& actuator : settings.slow) slow_.push_back(actuator.start);
}

bool Positions::move_fast(std::int64_t units) noexcept {
  return add(settings_.fast, fast_, settings_.fast.step > 0 ? units : -units);
}

bool Positions::move_slow(std::int64_t direction, double steps) noexcept {
  const auto& actuators = settings_.slow;
  const Actuator* turn = nullptr;
  for (std::size_t i = 0; i < slow_.size(); ++i) {
    if (!can_move(actuators[i], slow_[i], direction)) continue;
    if (turn == nullptr || (turn->stage - actuators[i].stage) * direction < 0) turn = &actuators[i];
  }
  if (turn == nullptr) return false;
  for (std::size_t i = 0; i < slow_.size(); ++i) {
    if (actuators[i].stage != turn->stage) continue;
    const double change = std::min(steps * static_cast<double>(std::abs(actuators[i].step)), 2.0 * kMost);
    add(actuators[i], slow_[i],
        (actuators[i].step > 0 ? direction : -direction) * static_cast<std::int64_t>(change));
  }
  return true;
}

bool Positions::place_slow(std::int64_t steps) noexcept {
  bool moved = false;
  for (std::size_t i = 0; i < slow_.size(); ++i) {
    const Actuator& actuator = settings_.slow[i];
    const auto wanted =
        static_cast<double>(actuator.start) + static_cast<double>(steps) * static_cast<double>(actuator.step);
    const auto place = static_cast<std::int64_t>(
        std::clamp(wanted, static_cast<double>(actuator.minimum), static_cast<double>(actuator.maximum)));
    moved |= place != slow_[i];
    slow_[i] = place;
  }
  return moved;
}

bool Positions::at_rail(std::int64_t direction) const noexcept {
  return !can_move(settings_.fast, fast_, direction);
}

void Positions::exchange(State& state) {
  const auto place = [&](const Actuator& actuator, std::int64_t& position) {
    state(position);
    position = std::clamp(position, actuator.minimum, actuator.maximum);
  };
  place(settings_.fast, fast_);
  for (std::size_t i = 0; i < slow_.size(); ++i) place(settings_.slow[i], slow_[i]);
}

std::int64_t Positions::from_centre() const noexcept {
  const std::int64_t offset =
      fast_ - (settings_.fast.minimum + (settings_.fast.maximum - settings_.fast.minimum) / 2);
  return settings_.fast.step > 0 ? offset : -offset;
}

}  // namespace edgert
