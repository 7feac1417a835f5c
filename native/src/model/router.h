// The choice of experts from a router's logits, for one row.
//
// A choice may be changed before it is weighed (see lossy.h).
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

// Makes the ranking of a row and chooses the best of it into `experts`; of equal ones the lower id. With
// `imposed` (ascending ids, else empty) the choice is made already.
void choose_row(const KernelTable& kernels, const RouterRecipe& recipe, const RouterRow& row,
                std::span<const std::int32_t> imposed);
// What the experts of the row are ordered by, the largest first; -inf where one cannot be chosen. Valid from
// choose_row() to weigh_row().
std::span<const float> ranking(const RouterRecipe& recipe, const RouterRow& row) noexcept;
// Fills weights. REQUIRES choose_row() of this row; its experts may have been changed since.
void weigh_row(const KernelTable& kernels, const RouterRecipe& recipe, const RouterRow& row);

}  // namespace edgert
