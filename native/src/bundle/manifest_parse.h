// The steps of Bundle::open.
#pragma once

#include <string_view>

#include "bundle/bundle.h"
#include "platform/memory.h"

namespace edgert {

Manifest parse_manifest(std::string_view text);
void check_file_header(const File& file, const Manifest& manifest, std::size_t index);

}  // namespace edgert
