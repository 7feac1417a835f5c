// THE table of knobs: everything a user or the controller can tune, declared once. The command line flag
// (--io-threads), the environment variable (EDGERT_IO_THREADS), the key of the configuration file
// (io_threads) and the documentation follow from it.
//
// Threads: constant data.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <variant>

namespace edgert {

enum class KnobKind : std::uint8_t {
  bytes,    // a number of bytes, written with or without a unit (10MiB)
  integer,  // a whole number
  number,   // any number
  choice,   // one of the words in `choices`
};

struct Knob {
  std::string_view name;
  KnobKind kind;
  std::variant<std::int64_t, std::string_view> default_value;  // a number, or one of `choices`
  std::int64_t minimum;                                        // of numbers; both ends are allowed
  std::int64_t maximum;
  std::span<const std::string_view> choices;  // words; a number may have them too ("auto" is then 0 in calls)
  std::string_view unit;                      // "" where it has none
  bool live;                                  // can change while a model runs
  std::string_view help;                      // one sentence
  bool lossy = false;                         // gives up quality unless it has its default; see model/lossy.h
};

std::span<const Knob> knobs() noexcept;
std::string_view name(KnobKind kind) noexcept;  // "bytes", "int", "float", "choice"
const Knob& knob(std::string_view name);        // Error{invalid_argument} that lists the known names
// Error{invalid_argument} where a number is outside its range; 0 is auto where the knob has it.
void check_knob(std::string_view name, std::int64_t value);
void check_number(std::string_view name, double value);  // the same of any number

}  // namespace edgert
