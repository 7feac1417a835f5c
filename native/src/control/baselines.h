// Controllers to compare with: a fixed setting, additive increase with multiplicative decrease,
// proportional-integral.
#pragma once

#include "control/controller.h"

namespace edgert {

class Fixed final : public Controller {
 public:
  explicit Fixed(ControlSettings settings) : settings_(std::move(settings)), positions_(settings_) {}
  Decision step(const Signal& signal) override;
  const ControlSettings& settings() const noexcept override { return settings_; }

 private:
  void exchange(State& state) override;

  const ControlSettings settings_;
  Positions positions_;
  std::uint64_t window_ = 0;
};

// A coordinate above the tight end: `increase` more in every window that is not above the band, what
// `decrease` leaves of it in one that is. In units of the fast knob, or in steps of the slow ones.
class Aimd final : public Controller {
 public:
  explicit Aimd(ControlSettings settings);
  Decision step(const Signal& signal) override;
  const ControlSettings& settings() const noexcept override { return settings_; }

 private:
  void exchange(State& state) override;

  const ControlSettings settings_;
  Positions positions_;
  std::uint64_t window_ = 0;
  double most_;        // of the coordinate
  double start_;       // where the knobs' start is
  double coordinate_;  // 0 is the tight end
};

// Proportional and integral to the distance from the band's middle; the integral stands while the output is
// at an end that it pushes against.
class Pi final : public Controller {
 public:
  explicit Pi(ControlSettings settings);
  Decision step(const Signal& signal) override;
  const ControlSettings& settings() const noexcept override { return settings_; }

 private:
  void exchange(State& state) override;

  const ControlSettings settings_;
  Positions positions_;
  std::uint64_t window_ = 0;
  double least_;
  double most_;
  double integral_ = 0;
};

}  // namespace edgert
