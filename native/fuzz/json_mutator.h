// Structure-aware mutation: values of a JSON document are replaced, moved, doubled and dropped, so that most
// inputs pass the parser and reach the checks behind it.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <string_view>

#include "bundle/json.h"

namespace edgert::fuzz {

std::string to_text(const Json& json);

// One to four mutations of a document; text that is not JSON has bytes changed instead. The same seed gives
// the same result.
std::string mutate_json(std::string_view text, std::uint32_t seed);

}  // namespace edgert::fuzz
