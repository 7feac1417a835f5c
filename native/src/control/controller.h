// What every controller shares: actuators, the signal of a window, the decision on it, the interface.
//
// A controller holds one signal inside a band. Knobs that are opened make the signal grow, knobs that are
// tightened make it shrink; `Actuator::step` says which way a knob opens. So a band on a load (events a
// second, bytes in use, degrees) takes its knobs as they are, and a band on misses takes the expert budget
// with a negative step.
//
// Contract: a decision follows from the settings and the signals so far alone, so that a record of decisions
// can be replayed bit for bit. One controller belongs to one thread at a time. Clocks and files are the
// caller's.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace edgert {

struct Actuator {
  std::string name;
  std::int64_t minimum = 0;  // both ends are allowed
  std::int64_t maximum = 0;
  std::int64_t start = 0;
  std::int64_t step =
      1;  // what a move that opens adds; of the fast knob the most that it changes in a window
  std::int64_t stage =
      0;  // slow knobs: tightening moves the lowest stage that still can, opening the highest
};

enum class SignalQuality : std::uint8_t {
  exact,
  at_least,  // something went uncounted: the signal was this or more
  missing,
};

struct Signal {
  double t = 0;      // seconds, kept for the record
  double value = 0;  // of the window that ended at t; one that is not finite is missing
  double age = 0;    // seconds since it was measured
  SignalQuality quality = SignalQuality::exact;
  bool urgent = false;  // safety: tighten the slow knobs now
};

enum class Action : std::uint8_t { hold, fast, slow, recentre };
enum class Reason : std::uint8_t {
  in_band,
  below,
  above,
  missing,      // no signal, or one that is too old
  lower_bound,  // the signal may be above what was counted
  blanking,     // a slow move's own disturbance
  rail,         // the fast knob sat at its rail for `patience` windows
  dwell,        // it did, but the last slow move is too near
  exhausted,    // it did, but no slow knob can go further
  hunting,      // the fast knob went back and forth without resting in the band
  safety,
};

struct Decision {
  std::uint64_t window = 0;  // from 0
  Signal signal;
  std::int64_t fast = 0;                // positions from now on
  std::vector<std::int64_t> slow = {};  // in the order of the settings
  Action action = Action::hold;
  Reason reason = Reason::in_band;
  std::int64_t direction = 0;  // +1 opened, -1 tightened
  // The state after it:
  std::int64_t at_open_rail = 0;   // windows in a row
  std::int64_t at_tight_rail = 0;  // windows in a row
  std::int64_t reversals = 0;
  std::int64_t blanking = 0;   // windows left
  std::int64_t dwell = 0;      // windows left
  std::int64_t fast_step = 0;  // the most that the fast knob moves in the next window
};

struct ControlSettings {
  double low = 0;  // the band
  double high = 0;
  Actuator fast;
  std::vector<Actuator> slow;
  std::int64_t patience = 2;  // windows at a rail before a slow move
  std::int64_t blanking = 1;  // windows after a slow move in which the signal is its own disturbance
  std::int64_t dwell = 4;     // windows between two slow moves, blanking included
  std::int64_t relief = 0;  // what a slow move gives the fast knob back, in its units, at most to its centre
  double slow_gain =
      0;  // steps of a slow move for each unit of the signal beyond the band; at least one step
  double hysteresis = 1.3;  // once out of the band, back is within the band's width divided by this
  double lead = 0;          // windows over which the slope of the signal is extended
  double max_age = std::numeric_limits<double>::infinity();  // seconds; an older signal is missing
  // Of the baselines:
  std::string drives = "fast";  // aimd and pi: fast or slow
  double increase = 1;          // aimd: added in a window, in units of the fast knob or in slow steps
  double decrease = 0.5;        // aimd: what is left after a window above the band
  double proportional = 1;      // pi: units for an error as wide as the band
  double integral = 0.2;        // pi: the same, added each window
};

// What a controller goes on from, as numbers in an order of its own: written out, or read back.
class State {
 public:
  State() = default;                                                                          // to be filled
  explicit State(std::vector<double> numbers) : numbers_(std::move(numbers)), read_(true) {}  // to be read
  void operator()(double& field);
  void operator()(std::int64_t& field);
  void operator()(std::uint64_t& field);
  const std::vector<double>& numbers() const noexcept { return numbers_; }
  void done() const;  // every number was read

 private:
  std::vector<double> numbers_;
  bool read_ = false;
  std::size_t at_ = 0;
};

class Controller {
 public:
  virtual ~Controller() = default;
  virtual Decision step(const Signal& signal) = 0;
  virtual const ControlSettings& settings() const noexcept = 0;
  // Error{invalid_argument} where the numbers are not those of such a controller with these settings.
  std::vector<double> state();
  void restore(std::vector<double> numbers);

 private:
  virtual void exchange(State& state) = 0;
};

// kind: "fast-slow", "published", "fixed", "aimd", "pi". Error{invalid_argument} by field.
std::unique_ptr<Controller> make_controller(std::string_view kind, ControlSettings settings);

std::string_view name(Action action) noexcept;
std::string_view name(Reason reason) noexcept;
std::string_view name(SignalQuality quality) noexcept;
SignalQuality signal_quality(std::string_view word);  // Error{invalid_argument} with the known words

// Positions that cannot leave their ranges.
class Positions {
 public:
  explicit Positions(const ControlSettings& settings);
  std::int64_t fast() const noexcept { return fast_; }
  const std::vector<std::int64_t>& slow() const noexcept { return slow_; }
  // Moves the fast knob by this many units, to the open side where positive; false where it stood at its end.
  bool move_fast(std::int64_t units) noexcept;
  // So many steps of the slow knobs of the stage whose turn it is; false where none could move.
  bool move_slow(std::int64_t direction, double steps = 1) noexcept;
  // Each slow knob this many steps from its start.
  bool place_slow(std::int64_t steps) noexcept;
  bool at_rail(std::int64_t direction) const noexcept;
  std::int64_t from_centre() const noexcept;  // in units, positive on the open side
  void exchange(State& state);

 private:
  const ControlSettings& settings_;
  std::int64_t fast_;
  std::vector<std::int64_t> slow_;
};

}  // namespace edgert
