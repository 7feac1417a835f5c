// The steps of Bundle::open.
#pragma once

#include <string>
#include <string_view>

#include "bundle/bundle.h"
#include "platform/memory.h"

namespace edgert {

// `where` names the manifest in messages.
Manifest parse_manifest(std::string_view text, const std::string& where);
void check_file_header(const File& file, const Manifest& manifest, std::size_t index);

}  // namespace edgert
