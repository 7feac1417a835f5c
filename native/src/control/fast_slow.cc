#include "control/fast_slow.h"

#include <algorithm>
#include <cmath>

#include "platform/error.h"

namespace edgert {
namespace {

constexpr std::int64_t kRestWindows = 4;    // times the patience: so long in the band ends a hunt
constexpr std::int64_t kPauseWindows = 60;  // a hunting knob that no slow move can help is held so long
constexpr std::int64_t kGrowingMoves = 4;   // moves in one direction after which a halved step grows again

// The direction that leads back into [low, high].
std::int64_t side(double value, double low, double high) noexcept {
  return value < low ? 1 : value > high ? -1 : 0;
}

}  // namespace

// --- as published -----------------------------------------------------------------------------------

PublishedLaw::PublishedLaw(ControlSettings settings) : settings_(std::move(settings)) {
  if (settings_.fast.step < 0)
    throw Error(ErrorKind::invalid_argument, "fast.step: the published law's fast knob opens upwards");
  last_.fast = settings_.fast.start;
  last_.fast_step = settings_.fast.maximum - settings_.fast.minimum;
  for (const Actuator& actuator : settings_.slow) last_.slow.push_back(actuator.start);
}

Decision PublishedLaw::step(const Signal& signal) {
  const auto [least, most] = std::pair(settings_.fast.minimum, settings_.fast.maximum);
  Decision& next = last_;
  next.signal = signal;
  next.action = Action::hold;
  next.direction = 0;
  next.reason = signal.value < settings_.low    ? Reason::below
                : signal.value > settings_.high ? Reason::above
                                                : Reason::in_band;
  if (std::isfinite(signal.value)) {
    const double share = (signal.value - settings_.low) / (settings_.high - settings_.low);
    const double wanted = static_cast<double>(most) - static_cast<double>(most - least) * share;
    const double clipped =
        std::clamp(std::trunc(wanted), static_cast<double>(least), static_cast<double>(most));
    const std::int64_t before = next.fast;
    next.fast = static_cast<std::int64_t>(clipped);
    if (next.fast != before) next.action = Action::fast;
    next.direction = (next.fast > before) - (next.fast < before);
  } else {
    next.reason = Reason::missing;
  }
  std::int64_t direction = 0;
  if (next.fast == most) {
    if (++next.at_open_rail == settings_.patience) next.at_open_rail = 0, direction = 1;
  } else if (next.fast == least) {
    if (++next.at_tight_rail == settings_.patience) next.at_tight_rail = 0, direction = -1;
  } else {
    next.at_open_rail = next.at_tight_rail = 0;
  }
  if (direction != 0) {
    for (std::size_t i = 0; i < next.slow.size(); ++i) next.slow[i] += direction * settings_.slow[i].step;
    next.action = Action::slow;
    next.reason = Reason::rail;
    next.direction = direction;
  }
  const Decision decided = next;
  ++next.window;
  return decided;
}

void PublishedLaw::exchange(State& state) {
  state(last_.window);
  state(last_.fast);
  for (std::int64_t& place : last_.slow) state(place);
  state(last_.at_open_rail);
  state(last_.at_tight_rail);
}

// --- repaired -----------------------------------------------------------------------------------------

FastSlow::FastSlow(ControlSettings settings)
    : settings_(std::move(settings)), positions_(settings_), fast_step_(slew()) {}

std::int64_t FastSlow::slew() const noexcept { return std::abs(settings_.fast.step); }

Decision FastSlow::step(const Signal& signal) {
  const Outcome outcome = decide(signal);
  return {.window = window_++,
          .signal = signal,
          .fast = positions_.fast(),
          .slow = positions_.slow(),
          .action = outcome.action,
          .reason = outcome.reason,
          .direction = outcome.direction,
          .at_open_rail = at_rail_[1],
          .at_tight_rail = at_rail_[0],
          .reversals = reversals_,
          .blanking = blanking_,
          .dwell = dwell_,
          .fast_step = fast_step_};
}

FastSlow::Outcome FastSlow::decide(const Signal& signal) {
  const bool blanked = blanking_ > 0;
  if (blanked) --blanking_;
  if (dwell_ > 0) --dwell_;
  if (signal.urgent) return shrink();
  const bool present = signal.quality != SignalQuality::missing && std::isfinite(signal.value);
  if (!present || !(signal.age <= settings_.max_age)) {
    forget_rails();
    previous_.reset();
    return {Action::hold, Reason::missing};
  }
  const bool counted = signal.quality == SignalQuality::exact;
  if (!counted && signal.value <= settings_.high) {
    forget_rails();
    previous_.reset();
    return {Action::hold, Reason::lower_bound};
  }
  if (blanked) return blank();
  const double slope = previous_ && counted ? signal.value - *previous_ : 0;
  previous_ = signal.value;
  const std::int64_t direction = wanted(signal.value + settings_.lead * slope);
  if (direction == 0 || (!counted && direction > 0)) return rest(signal.value);
  return act(direction, signal.value);
}

// Out of the band a correction starts; it ends in the inner part of the band, or on the way there after
// `patience` windows.
std::int64_t FastSlow::wanted(double value) const noexcept {
  const std::int64_t outer = side(value, settings_.low, settings_.high);
  if (outer != 0 || acting_ == 0) return outer;
  const std::int64_t inner = side(value, settings_.low + fringe_width(), settings_.high - fringe_width());
  return inner == acting_ && fringe_ < settings_.patience ? acting_ : 0;
}

double FastSlow::fringe_width() const noexcept {
  return (settings_.high - settings_.low) * (1 - 1 / settings_.hysteresis) / 2;
}

FastSlow::Outcome FastSlow::shrink() {
  const bool slow_moved = positions_.move_slow(-1);
  const bool fast_moved = positions_.move_fast(-slew());
  forget_rails();
  forget_hunt();
  previous_.reset();
  acting_ = relief_ = pause_ = 0;
  blanking_ = settings_.blanking;
  dwell_ = settings_.dwell;
  const Action action = slow_moved ? Action::slow : fast_moved ? Action::fast : Action::hold;
  return {action, Reason::safety, action == Action::hold ? 0 : -1};
}

FastSlow::Outcome FastSlow::blank() {
  forget_rails();
  previous_.reset();
  return {Action::hold, Reason::blanking};
}

FastSlow::Outcome FastSlow::rest(double value) {
  acting_ = fringe_ = 0;
  forget_rails();
  if (++rested_ >= kRestWindows * settings_.patience) {
    forget_hunt();
    fast_step_ = slew();
    turns_ = 0;
  }
  // What is about to leave the band is still in it; what is about to come back is not.
  const std::int64_t outer = side(value, settings_.low, settings_.high);
  if (outer != 0) return {Action::hold, outer > 0 ? Reason::below : Reason::above};
  return relief_ == 0 ? Outcome{Action::hold, Reason::in_band} : recentre(value);
}

// After a slow move has brought the signal well into the band, the fast knob leaves its rail for as long as
// the signal stays there: slowly, for the signal may lag.
FastSlow::Outcome FastSlow::recentre(double value) {
  const std::int64_t direction = relief_ > 0 ? 1 : -1;
  const bool room =
      direction > 0 ? value < settings_.high - fringe_width() : value > settings_.low + fringe_width();
  if (!room) {
    relief_ = 0;
    return {Action::hold, Reason::in_band};
  }
  const std::int64_t units = std::min(std::abs(relief_), std::max<std::int64_t>(1, slew() / 2)) * direction;
  relief_ -= units;
  positions_.move_fast(units);
  return {Action::recentre, Reason::in_band, direction};
}

FastSlow::Outcome FastSlow::act(std::int64_t direction, double value) {
  const Reason reason = direction > 0 ? Reason::below : Reason::above;
  const bool outside = side(value, settings_.low, settings_.high) == direction;
  rested_ = relief_ = 0;
  acting_ = direction;
  fringe_ = outside ? 0 : fringe_ + 1;
  if (pause_ > 0) {
    --pause_;
    return {Action::hold, Reason::hunting};
  }
  if (reversals_ > 0) {
    hunt_sum_ += value;
    ++hunt_windows_;
  }
  if (positions_.at_rail(direction)) {
    std::int64_t& count = at_rail_[direction > 0];
    at_rail_[direction < 0] = 0;
    count = outside ? std::min(count + 1, settings_.patience) : 0;
    const double beyond = direction > 0 ? settings_.low - value : value - settings_.high;
    return count >= settings_.patience ? slow(direction, Reason::rail, beyond)
                                       : Outcome{Action::hold, reason};
  }
  forget_rails();
  if (last_direction_ == -direction) {
    if (fast_step_ == 1) ++reversals_;  // a larger step is not the plant's fault
    ++turns_;
    fast_step_ = std::max<std::int64_t>(1, fast_step_ / 2);
    same_direction_ = 0;
  } else if (++same_direction_ >= kGrowingMoves * (1 + turns_)) {
    fast_step_ = std::min(slew(), fast_step_ * 2);
    same_direction_ = 0;
  }
  last_direction_ = direction;
  if (reversals_ >= 2 * settings_.patience) return hunted(direction);
  positions_.move_fast(direction * fast_step_);
  return {Action::fast, reason, direction};
}

// The fast knob straddles the band: what it delivered on average says which way the slow knobs should go.
FastSlow::Outcome FastSlow::hunted(std::int64_t direction) {
  const double mean = hunt_windows_ > 0 ? hunt_sum_ / static_cast<double>(hunt_windows_) : 0;
  const std::int64_t needed = hunt_windows_ > 0 ? side(mean, settings_.low, settings_.high) : 0;
  if (needed != 0) {
    const Outcome outcome = slow(needed, Reason::hunting, 0);
    if (outcome.reason != Reason::exhausted) return outcome;
  }
  const std::int64_t units = direction < 0 ? fast_step_ : 0;  // waits on the tight side
  forget_hunt();
  pause_ = kPauseWindows;
  if (units == 0) return {Action::hold, Reason::hunting};
  positions_.move_fast(-units);
  return {Action::fast, Reason::hunting, -1};
}

FastSlow::Outcome FastSlow::slow(std::int64_t direction, Reason reason, double beyond) {
  if (dwell_ > 0) return {Action::hold, Reason::dwell};
  const double steps = std::max(1.0, std::floor(settings_.slow_gain * beyond));
  if (!positions_.move_slow(direction, steps)) return {Action::hold, Reason::exhausted};
  blanking_ = settings_.blanking;
  dwell_ = settings_.dwell;
  relief_ = -direction * std::clamp<std::int64_t>(positions_.from_centre() * direction, 0, settings_.relief);
  acting_ = 0;
  forget_rails();
  forget_hunt();
  return {Action::slow, reason, direction};
}

void FastSlow::exchange(State& state) {
  positions_.exchange(state);
  state(window_);
  for (std::int64_t* field :
       {&at_rail_[0], &at_rail_[1], &blanking_, &dwell_, &relief_, &fast_step_, &acting_, &fringe_,
        &last_direction_, &same_direction_, &turns_, &reversals_, &rested_, &pause_, &hunt_windows_})
    state(*field);
  state(hunt_sum_);
  std::int64_t seen = previous_.has_value();
  double previous = previous_.value_or(0);
  state(seen);
  state(previous);
  previous_ = seen != 0 ? std::optional(previous) : std::nullopt;
  fast_step_ = std::clamp<std::int64_t>(fast_step_, 1, slew());
}

void FastSlow::forget_hunt() noexcept {
  reversals_ = hunt_windows_ = last_direction_ = same_direction_ = 0;
  hunt_sum_ = 0;
}

}  // namespace edgert
