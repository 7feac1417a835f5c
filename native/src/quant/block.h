// One row of one block as integers, whatever file or tile it comes from.
//
// Threads: functions without state.
#pragma once

#include <array>
#include <cstdint>

#include "quant/format.h"

namespace edgert {

struct BlockRow {
  static constexpr std::size_t kMaxGroups = 16;
  std::array<std::uint8_t, kMaxGroup> codes;
  std::uint16_t scale = 0;    // bits of the f16, or the e8m0 code
  std::uint16_t minimum = 0;  // bits of the f16
  std::array<std::int8_t, kMaxGroups> group_scales{};
  std::array<std::uint8_t, kMaxGroups> zeros{};  // or minima of the groups
};

// The weights of the format's block of columns: equal to those of ggml's reference bit for bit, where it has
// the format. REQUIRES an integer format.
void dequantize(const Format& format, const BlockRow& block, float* weights) noexcept;

// The f32 that a block's scale stands for.
float block_scale(const Format& format, const BlockRow& block) noexcept;

}  // namespace edgert
