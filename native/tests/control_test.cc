#include <cmath>
#include <limits>
#include <vector>

#include "control/controller.h"
#include "control/plants.h"
#include "support.h"

using namespace edgert;
using edgert::test::contains;
using edgert::test::error_of;

namespace {

ControlSettings camera() {
  ControlSettings out;
  out.low = 5e5;
  out.high = 2.5e6;
  out.fast = {.name = "refractory", .minimum = 4, .maximum = 57, .start = 30, .step = 8};
  out.slow = {{.name = "photoreceptor", .minimum = 0, .maximum = 255, .start = 119, .step = 5}};
  return out;
}

}  // namespace

TEST_CASE("the published law sets the fast knob at once and steps after two windows at a rail") {
  const auto law = make_controller("published", camera());
  std::vector<std::int64_t> fast, slow;
  for (const double rate : {1.5e6, 5e5, 0.0, 0.0, 2.5e6, 9e6}) {
    const Decision decision = law->step({.value = rate});
    fast.push_back(decision.fast);
    slow.push_back(decision.slow[0]);
  }
  CHECK(fast == std::vector<std::int64_t>{30, 57, 57, 57, 4, 4});
  CHECK(slow == std::vector<std::int64_t>{119, 119, 124, 124, 124, 119});
}

TEST_CASE("the repaired law waits for its patience, blanks the move and dwells") {
  ControlSettings settings = camera();
  settings.fast.step = 100;
  const auto law = make_controller("fast-slow", settings);
  std::vector<Reason> reasons;
  for (int i = 0; i < 7; ++i) reasons.push_back(law->step({.value = 0}).reason);
  CHECK(reasons == std::vector<Reason>{Reason::below, Reason::below, Reason::rail, Reason::blanking,
                                       Reason::below, Reason::dwell, Reason::rail});
}

TEST_CASE("a signal that is missing, too old or no number moves nothing") {
  ControlSettings settings = camera();
  settings.max_age = 1;
  const auto law = make_controller("fast-slow", settings);
  for (const Signal& signal :
       {Signal{.value = 0, .quality = SignalQuality::missing}, Signal{.value = 0, .age = 2},
        Signal{.value = std::nan("")}, Signal{.value = std::numeric_limits<double>::infinity()},
        Signal{.value = 0, .age = std::nan("")}}) {
    const Decision decision = law->step(signal);
    CHECK(decision.reason == Reason::missing);
    CHECK(decision.fast == 30);
  }
}

TEST_CASE("a plant follows its curve through delay and lag") {
  PlantSettings settings;
  settings.gain = 2;
  settings.slow_weights = {1};
  settings.slow_centres = {0};
  settings.delay = 1;
  settings.time_constant = 1;
  Plant plant(settings);
  CHECK(plant.step(1, {0}) == doctest::Approx(2 * (1 - std::exp(-1.0))));
  plant.step(5, {0});
  for (int i = 0; i < 60; ++i) plant.step(5, {0});
  CHECK(plant.step(5, {1}) == doctest::Approx(10));  // not yet
  CHECK(plant.steady(5, {1}) == 12);
  CHECK(contains(error_of(ErrorKind::invalid_argument, [&] { plant.steady(0, {}); }), "1"));
}

TEST_CASE("an unknown controller is refused with those that exist") {
  const auto message = error_of(ErrorKind::invalid_argument, [] { make_controller("magic", camera()); });
  CHECK(contains(message, "fast-slow, published, fixed, aimd, pi"));
}
