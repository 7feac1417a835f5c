#include "model/router.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace edgert {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The experts with the largest values; of equal ones the lower id.
void choose_best(std::span<const float> values, std::span<std::int32_t> chosen) {
  const auto value_of = [&](std::int32_t id) { return values[static_cast<std::size_t>(id)]; };
  std::size_t count = 0;  // chosen so far, the best first
  for (std::size_t e = 0; e < values.size(); ++e) {
    if (count == chosen.size() && !(values[e] > value_of(chosen.back()))) continue;
    std::size_t at = count < chosen.size() ? count++ : count - 1;
    for (; at > 0 && values[e] > value_of(chosen[at - 1]); --at) chosen[at] = chosen[at - 1];
    chosen[at] = static_cast<std::int32_t>(e);
  }
  std::sort(chosen.begin(), chosen.end());
}

float group_score(std::span<const float> values, GroupScore kind) {
  float best = -kInfinity, second = -kInfinity;
  for (const float value : values) {
    if (value > best) {
      second = best;
      best = value;
    } else if (value > second) {
      second = value;
    }
  }
  return kind == GroupScore::max ? best : best + second;
}

// Leaves -inf in the experts of all but the best groups; of equal groups the lower one stays.
void keep_best_groups(const ExpertGroups& groups, std::span<float> values, std::span<float> scores) {
  const std::size_t size = values.size() / scores.size();
  for (std::size_t g = 0; g < scores.size(); ++g)
    scores[g] = group_score(values.subspan(g * size, size), groups.score);
  for (std::size_t dropped = static_cast<std::size_t>(groups.keep); dropped < scores.size(); ++dropped) {
    std::size_t worst = 0;
    for (std::size_t g = 1; g < scores.size(); ++g) {
      if (scores[g] <= scores[worst]) worst = g;
    }
    std::fill_n(values.begin() + static_cast<std::ptrdiff_t>(worst * size), size, -kInfinity);
    scores[worst] = kInfinity;
  }
}

// What of the softmax over `logits` falls to `expert`, when experts far below the best one, and the one
// `without`, are left out.
float sparsemixer_weight(std::span<const float> logits, std::int32_t expert, std::int32_t without,
                         float jitter) {
  float best = -kInfinity;
  for (std::size_t e = 0; e < logits.size(); ++e) {
    if (static_cast<std::int32_t>(e) != without) best = std::max(best, logits[e]);
  }
  float sum = 0;
  float own = 0;
  for (std::size_t e = 0; e < logits.size(); ++e) {
    const auto id = static_cast<std::int32_t>(e);
    const bool far = (best - logits[e]) / std::max(std::fabs(logits[e]), best) > 2 * jitter;
    if (id == without || far) continue;
    const float share = std::exp(logits[e] - best);
    sum += share;
    if (id == expert) own = share;
  }
  return own / sum;
}

// The better expert's share among all, the other's among those that remain without it.
void sparsemixer(const RouterRecipe& recipe, const RouterRow& row) {
  const auto logit = [&](std::size_t n) { return row.logits[static_cast<std::size_t>(row.experts[n])]; };
  const std::size_t first = logit(1) > logit(0) ? 1 : 0;
  row.weights[first] = sparsemixer_weight(row.logits, row.experts[first], -1, recipe.jitter) * recipe.scale;
  row.weights[1 - first] =
      sparsemixer_weight(row.logits, row.experts[1 - first], row.experts[first], recipe.jitter) *
      recipe.scale;
}

void score(const KernelTable& kernels, Scoring scoring, std::span<float> logits) {
  if (scoring == Scoring::softmax) return kernels.softmax(logits.data(), logits.size());
  for (float& value : logits) value = 1 / (1 + std::exp(-value));
}

void weigh(const RouterRecipe& recipe, const RouterRow& row) {
  float sum = std::numeric_limits<float>::min();  // imposed experts may all have scores of zero
  for (std::size_t n = 0; n < row.experts.size(); ++n) {
    row.weights[n] = row.logits[static_cast<std::size_t>(row.experts[n])];
    sum += row.weights[n];
  }
  const float divisor = std::max(sum + recipe.norm_epsilon, recipe.norm_minimum);
  const float factor = recipe.scale / (recipe.normalize ? divisor : 1);
  for (float& weight : row.weights) weight *= factor;
}

// By score, bias and group.
void rank_apart(const RouterRecipe& recipe, const RouterRow& row) {
  const std::span values = row.space.first(row.logits.size());
  for (std::size_t e = 0; e < values.size(); ++e)
    values[e] = row.logits[e] + (row.selection_bias != nullptr ? row.selection_bias[e] : 0);
  if (recipe.groups) {
    const auto count = static_cast<std::size_t>(recipe.groups->count);
    keep_best_groups(*recipe.groups, values, row.space.subspan(values.size(), count));
  }
}

}  // namespace

std::size_t router_space(const FfnRecipe& recipe) {
  if (!recipe.router.chooses_apart()) return 0;
  return static_cast<std::size_t>(recipe.num_experts +
                                  (recipe.router.groups ? recipe.router.groups->count : 0));
}

void choose_row(const KernelTable& kernels, const RouterRecipe& recipe, const RouterRow& row,
                std::span<const std::int32_t> imposed) {
  if (recipe.chooses_apart()) {
    score(kernels, recipe.scoring, row.logits);
    rank_apart(recipe, row);
  }
  if (imposed.empty()) return choose_best(ranking(recipe, row), row.experts);
  std::copy(imposed.begin(), imposed.end(), row.experts.begin());
}

std::span<const float> ranking(const RouterRecipe& recipe, const RouterRow& row) noexcept {
  // Scores order experts as their logits do, which tell apart what a score rounds to the same.
  if (!recipe.chooses_apart()) return row.logits;
  return row.space.first(row.logits.size());
}

void weigh_row(const KernelTable& kernels, const RouterRecipe& recipe, const RouterRow& row) {
  if (recipe.scoring == Scoring::sparsemixer) {
    sparsemixer(recipe, row);
  } else {
    if (!recipe.chooses_apart()) score(kernels, recipe.scoring, row.logits);
    weigh(recipe, row);
  }
  if (row.expert_scale == nullptr) return;
  for (std::size_t n = 0; n < row.experts.size(); ++n) row.weights[n] *= row.expert_scale[row.experts[n]];
}

}  // namespace edgert
