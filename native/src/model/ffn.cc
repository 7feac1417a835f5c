// The feed-forward half of a layer: dense, or routed experts with an optional shared one.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "model/decoder.h"
#include "model/split_expert.h"

namespace edgert {
namespace {

// Adds rows of `width` floats, each times its weight, in their order: a part of them at a time, whose sums
// stay in registers. row(n), weight(n): of the n-th; a null row is left out.
void add_weighted(std::size_t rows, std::size_t width, const auto& row, const auto& weight, float* sum) {
  constexpr std::size_t kPart = 32;
  const auto add = [&]<bool Whole>(std::size_t at, std::size_t count) {
    float part[kPart] = {};
    for (std::size_t n = 0; n < rows; ++n) {
      const float* from = row(n);
      if (from == nullptr) continue;
      for (std::size_t j = 0; j < (Whole ? kPart : count); ++j) part[j] += weight(n) * from[at + j];
    }
    std::copy_n(part, count, sum + at);
  };
  std::size_t at = 0;
  for (; at + kPart <= width; at += kPart) add.template operator()<true>(at, kPart);
  if (at < width) add.template operator()<false>(at, width - at);
}

}  // namespace

void Decoder::ffn(int layer, std::span<const BatchRow> rows, const StepControl& control) {
  const BlockRecipe& block = recipe_.block(layer);
  const LayerWeights& w = weights_.layer(layer);
  Activations in = normed(w.ffn_norm, block, rows.size());
  observe(layer, Site::ffn, in);
  if (w.dense) gated_ffn(layer, *w.dense, in, s_.projected);
  if (!block.ffn.is_moe()) {
    add_residual(s_.projected, w.ffn_post_norm, block, rows.size());
    return;
  }
  if (block.ffn.branch_norms) observe(layer, Site::router, normed(w.router_norm, block, rows.size()));
  route(layer, rows);
  if (block.ffn.branch_norms) {
    in = normed(w.experts_norm, block, rows.size());
    observe(layer, Site::experts, in);
  }
  routed_experts(layer, in, control);
  combine(block, w, rows.size());
}

// out = down(activation(gate(in), up(in)))
void Decoder::gated_ffn(int layer, const GatedFfnWeights& w, Activations& in, float* out) {
  const FfnRecipe& recipe = recipe_.block(layer).ffn;
  const std::size_t width = w.gate.rows;
  if (any_integer({w.gate.format, w.up.format})) quantize(machine_, in, hidden());
  multiply(machine_, {product(w.gate, in, s_.gate, width), product(w.up, in, s_.up, width)});
  const Activations inner = activate(recipe, width, in.rows, any_integer({w.down.format}));
  observe(layer, recipe.is_moe() ? Site::shared_down : Site::ffn_down, inner);
  multiply(machine_, {product(w.down, inner, out, hidden())});
}

// In place of gate; quantised where an integer product wants it.
Activations Decoder::activate(const FfnRecipe& recipe, std::size_t width, std::size_t rows, bool integer) {
  Activations inner{s_.gate, width, rows, s_.inner};
  inner.quantized.padded = round_up(width, kMaxGroup);
  machine_.for_rows(rows, [&](std::size_t i, int) {
    float* gate = s_.gate + i * width;
    const float* up = s_.up + i * width;
    switch (recipe.activation) {
      case Activation::silu:
        machine_.kernels.silu_mul(gate, up, width);
        break;
      case Activation::gelu_tanh:
        machine_.kernels.gelu_tanh_mul(gate, up, width);
        break;
      case Activation::clamped_swiglu:
        machine_.kernels.clamped_swiglu(gate, up, width, recipe.activation_alpha, recipe.activation_limit);
        break;
    }
    if (integer) quantize_row(machine_, inner, width, i);
  });
  return inner;
}

// Fills pair_expert and pair_weight: each row's experts in ascending id, the order in which they are summed.
void Decoder::route(int layer, std::span<const BatchRow> rows) {
  const FfnRecipe& recipe = recipe_.block(layer).ffn;
  const auto experts = static_cast<std::size_t>(recipe.num_experts);
  const auto top = static_cast<std::size_t>(recipe.num_experts_per_tok);
  const LayerWeights& w = weights_.layer(layer);
  const float* logit_bias = recipe.router.bias == RouterBias::logits ? w.router_bias : nullptr;
  const float* selection_bias = recipe.router.bias == RouterBias::selection ? w.router_bias : nullptr;
  multiply(machine_,
           {product(w.router, {s_.normed, hidden(), rows.size(), {}}, s_.router, experts, logit_bias)});
  if (observer_ != nullptr) observer_->router(layer, {s_.normed, hidden(), rows.size()}, s_.router);
  const std::size_t space = router_space(recipe);
  const auto row_at = [&](std::size_t i) {
    return RouterRow{.logits = {s_.router + i * experts, experts},
                     .selection_bias = selection_bias,
                     .expert_scale = w.expert_scale,
                     .space = {s_.router_space + i * space, space},
                     .experts = {s_.pair_expert + i * top, top},
                     .weights = {s_.pair_weight + i * top, top}};
  };
  const bool lossy = lossy_ != LossyModes{};
  machine_.for_rows(rows.size(), [&](std::size_t i, int) {
    choose_row(machine_.kernels, recipe.router, row_at(i),
               imposed_ ? imposed_->experts(layer, rows[i].position) : std::span<const std::int32_t>());
    if (!lossy) weigh_row(machine_.kernels, recipe.router, row_at(i));
  });
  if (observer_ != nullptr) observer_->routed(layer, s_.pair_expert, s_.pair_weight);
  if (lossy) give_up(layer, rows.size(), row_at);
  if (preloader_ != nullptr) std::copy_n(s_.normed + (rows.size() - 1) * hidden(), hidden(), s_.router_input);
  const std::int32_t* last = s_.pair_expert + (rows.size() - 1) * top;
  std::copy(last, last + top, s_.last_experts + static_cast<std::size_t>(layer) * s_.most_per_token);
}

// What lossy.h says, between the choice of experts and their weights.
void Decoder::give_up(int layer, std::size_t rows, const std::function<RouterRow(std::size_t)>& row_at) {
  const FfnRecipe& recipe = recipe_.block(layer).ffn;
  std::span<std::uint8_t> at_hand;
  if (lossy_.asks_residency()) {
    at_hand = {s_.at_hand, static_cast<std::size_t>(recipe.num_experts)};
    store_.at_hand(layer, at_hand);
    for (std::size_t i = 0; i < rows && !imposed_; ++i)
      at_hand[static_cast<std::size_t>(first_choice(ranking(recipe.router, row_at(i))))] = 1;
  }
  machine_.for_rows(rows, [&](std::size_t i, int) {
    const RouterRow row = row_at(i);
    if (lossy_.cache_aware_routing > 0 && !imposed_) {
      replaced_.fetch_add(
          prefer_at_hand(ranking(recipe.router, row), at_hand, lossy_.cache_aware_routing, row.experts),
          std::memory_order_relaxed);
    }
    weigh_row(machine_.kernels, recipe.router, row);
    skipped_.fetch_add(skip_light(lossy_, at_hand, row.experts, row.weights), std::memory_order_relaxed);
  });
  for (std::size_t i = 0; i < rows && lossy_.low_precision_misses > 0; ++i)
    need_whole(lossy_, row_at(i).experts, row_at(i).weights, at_hand);
}

std::span<const std::int32_t> Decoder::last_experts(int layer) const noexcept {
  return {s_.last_experts + static_cast<std::size_t>(layer) * s_.most_per_token,
          static_cast<std::size_t>(recipe_.block(layer).ffn.num_experts_per_tok)};
}

// Groups the (row, expert) pairs by expert, rows ascending; returns how many experts are in use.
std::size_t Decoder::group_by_expert(const FfnRecipe& recipe, std::size_t rows) {
  const auto experts = static_cast<std::size_t>(recipe.num_experts);
  const auto top = static_cast<std::size_t>(recipe.num_experts_per_tok);
  const std::size_t pairs = rows * top;
  std::int32_t* first = s_.expert_first;
  std::fill(first, first + experts + 1, 0);
  for (std::size_t p = 0; p < pairs; ++p) {
    if (s_.pair_expert[p] != kNoExpert) ++first[s_.pair_expert[p] + 1];
  }
  std::size_t used = 0;
  for (std::size_t e = 0; e < experts; ++e) {
    if (first[e + 1] > 0) s_.expert_ids[used++] = static_cast<std::int32_t>(e);
    first[e + 1] += first[e];
  }
  // Each placement advances its expert's start; afterwards first[e] is where group e + 1 begins.
  for (std::size_t p = 0; p < pairs; ++p) {
    if (s_.pair_expert[p] == kNoExpert) continue;
    const std::int32_t slot = first[s_.pair_expert[p]]++;
    s_.pair_slot[p] = slot;
    s_.grouped_rows[slot] = static_cast<std::int32_t>(p / top);
    if (recipe.router.weighs_input) s_.grouped_weight[slot] = std::exchange(s_.pair_weight[p], 1.0F);
  }
  std::copy_backward(first, first + experts, first + experts + 1);
  first[0] = 0;
  return used;
}

void Decoder::routed_experts(int layer, Activations& in, const StepControl& control) {
  const FfnRecipe& recipe = recipe_.block(layer).ffn;
  const std::size_t used = group_by_expert(recipe, in.rows);
  const auto& combinations = bundle_.manifest().expert_formats;
  const bool integer = std::any_of(combinations.begin(), combinations.end(), [](const ExpertFormats& f) {
    return !format(f.gate).is_float() || !format(f.up).is_float();
  });
  if (integer) quantize(machine_, in, hidden());

  std::vector<std::uint8_t> base_suffices;
  const bool patches = patched_ != nullptr && patched_->current() != nullptr;  // of whole experts
  for (std::size_t i = 0; i < used && lossy_.low_precision_misses > 0 && !patches; ++i)
    base_suffices.push_back(s_.at_hand[s_.expert_ids[i]] == 0 ? 1 : 0);
  const auto request = store_.acquire(layer, {s_.expert_ids, used}, control.cancelled, base_suffices);
  prefetch_after(layer, used);
  if (in.rows == 1 && preloader_ != nullptr) look_ahead_of(layer, {s_.expert_ids, used});
  for (;;) {
    std::vector<ExpertWork> group;  // what is ready, to be computed together
    std::size_t rows = 0;
    const auto add = [&](std::optional<ExpertStore::Lease> lease) {
      if (!lease) return false;
      const std::int32_t first = s_.expert_first[lease->expert()];
      const auto count = static_cast<std::size_t>(s_.expert_first[lease->expert() + 1] - first);
      if (lease->base()) low_precision_.fetch_add(count, std::memory_order_relaxed);
      group.push_back({std::move(*lease), static_cast<std::size_t>(first), count, rows});
      rows += count;
      return true;
    };
    if (!add(request->next())) return;
    while (rows < s_.group_rows && add(request->next_ready())) {
    }
    control.check();
    const auto patches_of_group = patch_experts(layer, group);
    run_experts(layer, group, rows, in, patches_of_group.get());
  }
}

// Those that carry other patches than the ones that are on.
std::unique_ptr<PatchedWeights::Pending> Decoder::patch_experts(int layer, std::span<ExpertWork> group) {
  if (patched_ == nullptr) return nullptr;
  std::vector<ExpertStore::Lease*> stale;
  for (ExpertWork& work : group) {
    if (work.lease.change() != patched_->current()) stale.push_back(&work.lease);
  }
  return stale.empty() ? nullptr : std::make_unique<PatchedWeights::Pending>(*patched_, layer, stale);
}

// Rows that use most experts of this layer will use most of the next one's: storage need not idle until its
// router has spoken. What it does not name is seldom read, for what it names goes first from then on.
void Decoder::prefetch_after(int layer, std::size_t used) {
  constexpr double kMost = 0.6;
  if (layer + 1 == recipe_.num_layers()) return;
  const FfnRecipe& here = recipe_.block(layer).ffn;
  const FfnRecipe& next = recipe_.block(layer + 1).ffn;
  if (!next.is_moe() || static_cast<double>(used) < kMost * here.num_experts) return;
  std::vector<int> all(static_cast<std::size_t>(next.num_experts));
  std::iota(all.begin(), all.end(), 0);
  store_.prefetch(layer + 1, all);
}

// Once the layer's own reads are under way, so that it is done while they are waited for.
void Decoder::look_ahead_of(int layer, std::span<const std::int32_t> experts) {
  preloader_->routed({.row = moe_rows_[static_cast<std::size_t>(layer)],
                      .experts = experts,
                      .residual = s_.x,
                      .router_input = s_.router_input});
}

// Each expert's down(activation(gate(in), up(in))) into its rows of expert_out, in three parallel regions for
// all.
void Decoder::run_experts(int layer, std::span<const ExpertWork> group, std::size_t rows,
                          const Activations& in, PatchedWeights::Pending* patches) {
  const FfnRecipe& recipe = recipe_.block(layer).ffn;
  if (observer_ != nullptr) observe_experts(layer, Site::expert_input, group, in);
  const auto width = static_cast<std::size_t>(recipe.intermediate_size);
  const auto layout_of = [&](const ExpertWork& work) {
    const ExpertFormats& formats = bundle_.manifest().expert_formats[work.lease.formats()];
    return expert_layout(work.lease.base() ? *base_formats(formats) : formats, hidden(), recipe);
  };
  const auto bias_of = [&](const ExpertWork& work, const ExpertLayout& layout, std::size_t first) {
    return recipe.expert_bias ? reinterpret_cast<const float*>(work.lease.data() + layout.bias_offset) + first
                              : nullptr;
  };
  bool integer = false;
  std::vector<Product> products;
  for (const ExpertWork& work : group) {
    const ExpertLayout layout = layout_of(work);
    const std::byte* data = work.lease.data();
    const auto target = [&](ExpertPart part) {
      return weights_.targets()->expert(layer, work.lease.expert(), part);
    };
    const Matrix gate{layout.formats.gate, width, hidden(), data, target(ExpertPart::gate)};
    const Matrix up{layout.formats.up, width, hidden(), data + layout.up_offset, target(ExpertPart::up)};
    for (Product p : {product(gate, in, s_.gate + work.row * width, width, bias_of(work, layout, 0)),
                      product(up, in, s_.up + work.row * width, width, bias_of(work, layout, width))}) {
      p.gather = s_.grouped_rows + work.first;
      p.m = work.count;
      if (patches != nullptr) p.repatch = patches->of(p.target);
      products.push_back(p);
    }
    integer = integer || any_integer({layout.formats.down});
  }
  multiply(machine_, products);
  if (recipe.router.weighs_input) weigh_inner(group, width);
  const Activations inner = activate(recipe, width, rows, integer);
  if (observer_ != nullptr) observe_experts(layer, Site::expert_inner, group, inner);
  products.clear();
  for (const ExpertWork& work : group) {
    const ExpertLayout layout = layout_of(work);
    const Matrix down{layout.formats.down, hidden(), width, work.lease.data() + layout.down_offset,
                      weights_.targets()->expert(layer, work.lease.expert(), ExpertPart::down)};
    Product& p = products.emplace_back(product(down, inner.slice(work.row, work.count),
                                               s_.expert_out + work.first * hidden(), hidden(),
                                               bias_of(work, layout, 2 * width)));
    p.batch_rows = s_.grouped_rows + work.first;
    if (patches != nullptr) p.repatch = patches->of(p.target);
  }
  multiply(machine_, products);
}

// `in`: of every row of the step, or of the group's rows in its order.
void Decoder::observe_experts(int layer, Site site, std::span<const ExpertWork> group,
                              const Activations& in) {
  std::vector<ObservedExpert> shown;
  for (const ExpertWork& work : group) {
    const Activations own = site == Site::expert_inner ? in.slice(work.row, work.count) : in;
    const std::int32_t* gather = site == Site::expert_inner ? nullptr : s_.grouped_rows + work.first;
    shown.push_back({work.lease.expert(), {own.x, own.stride, work.count, gather}});
  }
  observer_->experts(layer, site, shown);
}

// The weight of an expert's input, which gate and up are linear in.
void Decoder::weigh_inner(std::span<const ExpertWork> group, std::size_t width) {
  for (const ExpertWork& work : group) {
    machine_.for_rows(work.count, [&](std::size_t i, int) {
      const float weight = s_.grouped_weight[work.first + i];
      for (float* inner : {s_.gate, s_.up}) {
        float* row = inner + (work.row + i) * width;
        for (std::size_t j = 0; j < width; ++j) row[j] *= weight;
      }
    });
  }
}

// x += residual_scale * (sum of weighted experts in ascending id + gated shared expert)
void Decoder::combine(const BlockRecipe& block, const LayerWeights& w, std::size_t rows) {
  const auto top = static_cast<std::size_t>(block.ffn.num_experts_per_tok);
  const auto norm = [&](const float* weight, float* x) {
    if (weight != nullptr) machine_.kernels.rms_norm(x, weight, hidden(), block.norm_eps, x);
  };
  float* gates = s_.router;  // the router's scores are spent
  if (w.shared_router)
    multiply(machine_, {product(*w.shared_router, {s_.normed, hidden(), rows, {}}, gates, 1)});
  machine_.for_rows(rows, [&](std::size_t i, int) {
    float* sum = s_.normed + i * hidden();  // the normed input is spent
    const auto out = [&](std::size_t n) -> const float* {
      if (s_.pair_expert[i * top + n] == kNoExpert) return nullptr;
      return s_.expert_out + static_cast<std::size_t>(s_.pair_slot[i * top + n]) * hidden();
    };
    add_weighted(top, hidden(), out, [&](std::size_t n) { return s_.pair_weight[i * top + n]; }, sum);
    norm(w.experts_post_norm, sum);
    if (w.dense) {
      norm(w.shared_post_norm, s_.projected + i * hidden());
      const float gate = w.shared_router ? 1 / (1 + std::exp(-gates[i])) : 1.0F;
      const float* shared = s_.projected + i * hidden();
      for (std::size_t j = 0; j < hidden(); ++j) sum[j] += gate * shared[j];
    }
  });
  add_residual(s_.normed, w.ffn_post_norm, block, rows);
}

}  // namespace edgert
