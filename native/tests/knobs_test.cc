#include "control/knobs.h"

#include <algorithm>
#include <set>

#include "support.h"

using namespace edgert;
using edgert::test::contains;
using edgert::test::error_of;

TEST_CASE("every knob has a name of its own, a help text and a default that it allows") {
  std::set<std::string_view> names;
  for (const Knob& row : knobs()) {
    CAPTURE(std::string(row.name));
    CHECK(names.insert(row.name).second);
    CHECK(row.help.ends_with("."));
    CHECK(row.minimum <= row.maximum);
    CHECK((row.kind == KnobKind::choice) == row.unit.empty());
    if (const auto* number = std::get_if<std::int64_t>(&row.default_value)) {
      CHECK(row.kind != KnobKind::choice);
      CHECK(row.minimum <= *number);
      CHECK(*number <= row.maximum);
    } else {
      CHECK(std::ranges::count(row.choices, std::get<std::string_view>(row.default_value)) == 1);
    }
  }
}

TEST_CASE("a knob is found by its name; another name is refused with those that exist") {
  CHECK(knob("io_threads").maximum == 256);
  const auto message = error_of(ErrorKind::invalid_argument, [] { knob("speed"); });
  CHECK(contains(message, "speed"));
  CHECK(contains(message, "memory, threads"));
}
