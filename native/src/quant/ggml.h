// Blocks of quantised weights as ggml's files hold them: row-major, a block a run of columns of one row.
//
// Threads: functions without state.
#pragma once

#include <cstddef>
#include <span>
#include <string_view>

#include "quant/block.h"
#include "quant/format.h"

namespace edgert {

struct BlockType {
  std::string_view name;  // ggml's
  std::size_t bytes;      // of a block; it has as many columns as one of the format
  FormatId format;        // which holds the same numbers
  void (*read)(const std::byte* from, BlockRow& to);

  std::size_t elements() const noexcept { return static_cast<std::size_t>(edgert::format(format).block); }
};

std::span<const BlockType> block_types() noexcept;
const BlockType& block_type(std::string_view name);  // Error{unsupported} that lists the known names

}  // namespace edgert
