// The fast/slow law: as published for event cameras (Nair, Milford, Fischer 2024), and repaired.
// docs/controllers.md states both in full.
#pragma once

#include <optional>

#include "control/controller.h"

namespace edgert {

// As published, gaps included: the fast knob follows the signal at once and without a slew limit, the slow
// knobs have no ends, and a rail does not clear the other rail's counter. Knows neither missing signals nor
// safety.
class PublishedLaw final : public Controller {
 public:
  explicit PublishedLaw(ControlSettings settings);
  Decision step(const Signal& signal) override;
  const ControlSettings& settings() const noexcept override { return settings_; }

 private:
  void exchange(State& state) override;

  const ControlSettings settings_;
  Decision last_;
};

// Repaired. Holds whatever the signals are: positions stay in their ranges; the fast knob moves by at most
// |fast.step| a window; slow knobs move only after `patience` windows at a rail (or after 2 * patience
// reversals), and at most once in `dwell` windows, but for safety; a missing signal moves nothing; one that
// is a lower bound opens nothing.
class FastSlow final : public Controller {
 public:
  explicit FastSlow(ControlSettings settings);
  Decision step(const Signal& signal) override;
  const ControlSettings& settings() const noexcept override { return settings_; }

 private:
  struct Outcome {
    Action action;
    Reason reason;
    std::int64_t direction = 0;
  };
  void exchange(State& state) override;
  Outcome decide(const Signal& signal);
  Outcome shrink();            // safety
  Outcome blank();             // the window after a slow move
  Outcome rest(double value);  // in the band
  Outcome recentre(double value);
  Outcome act(std::int64_t direction, double value);  // outside of it
  Outcome hunted(std::int64_t direction);
  Outcome slow(std::int64_t direction, Reason reason, double beyond);  // how far beyond the band
  std::int64_t wanted(double value) const noexcept;  // the direction back into the band, 0 within
  double fringe_width() const noexcept;              // between the band and its inner part
  void forget_rails() noexcept { at_rail_[0] = at_rail_[1] = 0; }
  void forget_hunt() noexcept;
  std::int64_t slew() const noexcept;

  const ControlSettings settings_;
  Positions positions_;
  std::uint64_t window_ = 0;
  std::int64_t at_rail_[2] = {0, 0};  // windows in a row at the tight, the open rail
  std::int64_t blanking_ = 0;
  std::int64_t dwell_ = 0;
  std::int64_t relief_ = 0;          // still to be given back to the fast knob
  std::int64_t fast_step_;           // halves with each reversal
  std::int64_t acting_ = 0;          // the direction of the correction under way
  std::int64_t fringe_ = 0;          // windows in a row between the band and its inner part
  std::int64_t last_direction_ = 0;  // of the fast knob
  std::int64_t same_direction_ = 0;  // moves in a row
  std::int64_t turns_ = 0;  // reversals since the signal last stayed in the band: each makes growing slower
  std::int64_t reversals_ = 0;  // those with the smallest step
  std::int64_t rested_ = 0;     // windows in a row in the band
  std::int64_t pause_ = 0;      // windows left in which a hunting fast knob is held
  double hunt_sum_ = 0;         // of the signal since the first reversal
  std::int64_t hunt_windows_ = 0;
  std::optional<double> previous_;
};

}  // namespace edgert
