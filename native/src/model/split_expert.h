// Routed experts whose precision is split: a base that runs by itself, and a refinement that makes it whole.
//
// On storage: the base, an expert's extent in the base's formats (see ExpertLayout) with its biases, padded
// to the alignment of direct reads; then the refinements of gate, up and down, one directly after the other.
//
// Threads: functions without state.
#pragma once

#include <cstddef>
#include <optional>
#include <span>

#include "model/weights.h"

namespace edgert {

// nullopt unless all three formats split.
std::optional<ExpertFormats> base_formats(const ExpertFormats& formats) noexcept;

struct SplitLayout {
  ExpertLayout whole{};
  ExpertLayout base{};
  std::size_t refinement_offset = 0;
  std::size_t bytes = 0;
};
// REQUIRES formats that split.
SplitLayout split_layout(const ExpertFormats& formats, std::size_t hidden_size, const FfnRecipe& ffn);

// `parts` gets layout.bytes. False where they would not make `whole` again.
bool split_expert(const SplitLayout& layout, std::size_t hidden_size, const FfnRecipe& ffn,
                  std::span<const std::byte> whole, std::span<std::byte> parts);
// `whole` gets layout.whole.bytes, and may begin where parts that end in `refinement` do.
void join_expert(const SplitLayout& layout, std::size_t hidden_size, const FfnRecipe& ffn,
                 std::span<const std::byte> base, std::span<const std::byte> refinement,
                 std::span<std::byte> whole);

}  // namespace edgert
