// Files and memory for tests of reads.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>

#include "platform/memory.h"
#include "storage/file.h"

namespace edgert::test {

inline constexpr std::size_t kPage = File::kDirectAlignment;

// `n` bytes that tell their place.
inline std::string pattern(std::size_t n) {
  std::string text(n, '\0');
  for (std::size_t i = 0; i < n; ++i) text[i] = static_cast<char>(i * 31 + i / 251);
  return text;
}

inline Buffer pages(std::size_t bytes) {
  return Buffer(std::make_shared<Budget>(bytes + page_size()), bytes, "test");
}

inline std::string_view text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

}  // namespace edgert::test
