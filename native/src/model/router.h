// The choice of experts from a router's logits, for one row.
//
// Threads: pure over its arguments. A row's choice and weights depend on that row alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/kernels.h"
#include "model/recipe.h"

namespace edgert {

struct RouterRow {
  std::span<float> logits;          // [num_experts], overwritten
  const float* selection_bias;      // [num_experts]; null where the recipe has none
  const float* expert_scale;        // [num_experts], multiplies the weights; likewise
  std::span<float> space;           // router_space() floats
  std::span<std::int32_t> experts;  // [num_experts_per_tok], ascending
  std::span<float> weights;         // likewise
};

// Floats that route_row() needs beside the logits.
std::size_t router_space(const FfnRecipe& recipe);

// Fills experts and weights. Of equal experts the lower id is chosen. With `imposed` (ascending ids, else
// empty) the choice is made already, and only the weights are the router's.
void route_row(const KernelTable& kernels, const RouterRecipe& recipe, const RouterRow& row,
               std::span<const std::int32_t> imposed);

}  // namespace edgert
