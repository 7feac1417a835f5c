// Whether something that may help or hurt a model's speed does, found out while it runs.
//
// Steps run in windows with it and without it by turns, in the order on, off, off, on, so that what drifts
// evenly counts for neither. Each pair of windows gives one gain. It is on from then on only where the mean
// of at least kLeastPairs gains is above zero by more than kSure of its own standard errors; off where it is
// as surely below, or where kMostPairs have decided nothing. Then it looks again after kAgain steps, and
// after twice as many each time that it finds no gain: so what does not pay runs in one step of twenty soon,
// and in ever fewer.
//
// Threads: one at a time. Deterministic: it knows no clock but the seconds that it is told.
#pragma once

#include <array>

namespace edgert {

class Trial {
 public:
  static constexpr int kWindow =
      8;  // steps; the first is not counted, for it begins with the other's leavings
  static constexpr int kLeastPairs = 4;
  static constexpr int kMostPairs = 10;
  static constexpr double kSure = 2;
  static constexpr int kAgain = 1024;
  static constexpr int kRarest = 16384;

  bool on() const noexcept { return on_; }
  bool looking() const noexcept { return looking_; }
  // A step took so long as on() was.
  void step(double seconds);

 private:
  void end_window();
  void begin_window() noexcept;
  void settle(bool on) noexcept;

  bool looking_ = true;
  bool on_ = true;
  int steps_ = 0;                 // of the window, or since it was settled
  double seconds_ = 0;            // of the window's counted steps
  int windows_ = 0;               // ended since it began to look
  std::array<double, 2> pair_{};  // seconds without and with
  double sum_ = 0;                // of the gains, each a share of the time without
  double squares_ = 0;
  int again_ = kAgain;
};

}  // namespace edgert
