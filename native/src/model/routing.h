// Routing imposed from outside: the experts of each position, in place of the router's choice.
//
// For measurements: a model of random weights then pages as a recorded one did. The experts follow from the
// position alone (modulo the number of positions given), so a row's result still depends on that row alone.
// How much each expert counts remains the router's to say.
//
// Threads: immutable. Ownership: the caller's memory, not the budget's.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "model/recipe.h"

namespace edgert {

class ImposedRouting {
 public:
  // Expert ids by position, MoE layer and choice.
  using Table = std::vector<std::vector<std::vector<std::int32_t>>>;

  // Error{invalid_argument} naming position and MoE layer, where the table does not fit the recipe.
  ImposedRouting(const Recipe& recipe, const Table& table);

  // num_experts_per_tok distinct ids, ascending. REQUIRES an MoE layer (a layer number of the recipe).
  std::span<const std::int32_t> experts(int layer, std::int64_t position) const noexcept;

 private:
  struct Row {  // of a layer, within a position
    std::size_t first = 0;
    std::size_t count = 0;
  };
  std::vector<Row> rows_;
  std::size_t per_position_ = 0;
  std::size_t positions_;
  std::vector<std::int32_t> experts_;
};

}  // namespace edgert
