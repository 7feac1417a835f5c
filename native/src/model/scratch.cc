#include "model/scratch.h"

#include <algorithm>

#include "model/router.h"
#include "platform/memory.h"

namespace edgert {
namespace {

constexpr int kLogitRows = 8;
constexpr std::size_t kLine = 64;

class Layout {
 public:
  explicit Layout(std::byte* base) : base_(base) {}
  template <typename T>
  T* take(std::size_t count) {
    const std::size_t at = offset_;
    offset_ = round_up(offset_ + count * sizeof(T), kLine);
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + at);
  }
  QuantizedRows take_quantized(std::size_t rows, std::size_t cols) {
    const std::size_t padded = round_up(cols, kMaxGroup);
    const std::size_t groups = padded / kActivationGroup;
    QuantizedRows q;
    q.codes = take<std::int8_t>(rows * padded);
    q.scales = take<float>(rows * groups);
    q.sums = take<GroupSum>(rows * groups);
    q.padded = padded;
    return q;
  }
  std::size_t bytes() const { return offset_; }

 private:
  std::byte* base_;
  std::size_t offset_ = 0;
};

struct Widths {
  std::size_t q = 0, kv = 0, wide = 0, mixed = 0, input = 0, rotated = 0, key = 0, queries = 0;
  std::size_t inner = 0, experts = 0, per_token = 0, gates = 0, heads = 0;
  std::size_t router_space = 0, weighed = 0;
};

void grow(std::size_t& to, std::size_t value) { to = std::max(to, value); }
void grow(std::size_t& to, int value) { grow(to, static_cast<std::size_t>(value)); }

// Columns of `count` inputs of a product, as quantised.
std::size_t padded(int count, int cols) {
  return static_cast<std::size_t>(count) * round_up(static_cast<std::size_t>(cols), kMaxGroup);
}

void add(Widths& w, const AttentionRecipe& a, const ScratchShape& shape) {
  grow(w.q, a.num_heads * a.head_dim);
  grow(w.kv, a.num_kv_heads * a.head_dim);
  grow(w.mixed, a.num_heads * a.head_dim);
  if (a.output_gate) grow(w.wide, a.num_heads * a.head_dim);
  grow(w.input, padded(1, a.num_heads * a.head_dim));
  grow(w.rotated, a.head_dim);
  grow(w.key, a.head_dim);
  const int group = a.num_heads / a.num_kv_heads;
  grow(w.queries, group * std::min(shape.rows, attention_rows(group)));
}

void add(Widths& w, const LatentAttentionRecipe& a, const ScratchShape& shape) {
  const int rank = a.q_rank.value_or(0);
  grow(w.q, a.num_heads * std::max(a.query_dim(), a.value_head_dim));
  grow(w.kv, a.key_dim());
  grow(w.wide, a.num_heads * a.key_dim());
  grow(w.mixed, std::max(rank, a.num_heads * a.kv_rank));
  grow(w.input, padded(1, rank));
  grow(w.input, padded(a.num_heads, a.nope_head_dim));
  grow(w.input, padded(a.num_heads, a.kv_rank));
  grow(w.input, padded(1, a.num_heads * a.value_head_dim));
  grow(w.rotated, a.rope_head_dim);
  grow(w.key, a.key_dim());
  grow(w.queries, latent_group(a.num_heads, shape.threads));
  grow(w.heads, a.num_heads);
}

void add(Widths& w, const GatedDeltaRecipe& d, const ScratchShape&) {
  grow(w.q, d.channels());
  grow(w.mixed, d.channels());
  grow(w.kv, d.values());
  grow(w.input, padded(1, d.values()));
  grow(w.gates, 2 * d.num_value_heads);
}

void add(Widths&, const ShortConvRecipe&, const ScratchShape&) {}

Widths widths(const Recipe& recipe, const ScratchShape& shape) {
  Widths w;
  grow(w.input, padded(1, recipe.hidden_size));
  for (const BlockRecipe& block : recipe.blocks) {
    std::visit([&](const auto& mixer) { add(w, mixer, shape); }, block.mixer);
    if (std::holds_alternative<ShortConvRecipe>(block.mixer)) {
      grow(w.q, 3 * recipe.hidden_size);
      grow(w.mixed, recipe.hidden_size);
    }
    grow(w.inner, block.ffn.intermediate_size);
    if (block.ffn.shared) grow(w.inner, block.ffn.shared->intermediate_size);
    grow(w.experts, block.ffn.num_experts);
    grow(w.per_token, block.ffn.num_experts_per_tok);
    w.router_space = std::max(w.router_space, router_space(block.ffn));
    if (block.ffn.router.weighs_input) grow(w.weighed, block.ffn.num_experts_per_tok);
  }
  return w;
}

}  // namespace

int latent_group(int heads, int threads) {
  constexpr int kTogether = 4;  // what kernels take at a time at most
  const int share = (heads + threads - 1) / threads;
  return std::min(heads, (share + kTogether - 1) / kTogether * kTogether);
}

Scratch Scratch::layout(const Recipe& recipe, const ScratchShape& shape, std::byte* base) {
  const Widths w = widths(recipe, shape);
  const auto rows = static_cast<std::size_t>(shape.rows);
  const auto hidden = static_cast<std::size_t>(recipe.hidden_size);
  const auto vocab = static_cast<std::size_t>(recipe.vocab_size);
  const std::size_t pairs = rows * w.per_token;
  Layout layout(base);
  Scratch s;
  s.logit_rows = std::min(shape.rows, kLogitRows);
  s.x = layout.take<float>(rows * hidden);
  s.normed = layout.take<float>(rows * hidden);
  s.q = layout.take<float>(rows * w.q);
  s.k = layout.take<float>(rows * w.kv);
  s.v = layout.take<float>(rows * w.kv);
  s.wide = layout.take<float>(rows * w.wide);
  s.mixed = layout.take<float>(rows * w.mixed);
  s.gates = layout.take<float>(rows * w.gates);
  s.head_rows = layout.take<std::int32_t>(rows * w.heads);
  s.rotation = layout.take<float>(rows * round_up(w.rotated, 2));
  Attention largest;
  largest.rows = 1;
  largest.group = static_cast<int>(w.queries);
  largest.head_dim = static_cast<int>(w.key);
  largest.end = shape.context;
  largest.kv_type = shape.kv_type;
  s.attention_floats = attention_scratch(largest);
  s.attention = layout.take<float>(static_cast<std::size_t>(shape.threads) * s.attention_floats);
  s.inputs = layout.take_quantized(rows, w.input);
  s.group_rows = std::max(rows, w.per_token);
  const std::size_t inner_rows = s.group_rows + rows;
  s.inner = layout.take_quantized(inner_rows, w.inner);
  s.gate = layout.take<float>(inner_rows * w.inner);
  s.up = layout.take<float>(inner_rows * w.inner);
  s.projected = layout.take<float>(rows * hidden);
  s.router = layout.take<float>(rows * w.experts);
  s.router_input = layout.take<float>(hidden);
  s.router_space = layout.take<float>(rows * w.router_space);
  s.expert_out = layout.take<float>(pairs * hidden);
  s.pair_weight = layout.take<float>(pairs);
  s.pair_expert = layout.take<std::int32_t>(pairs);
  s.pair_slot = layout.take<std::int32_t>(pairs);
  s.grouped_rows = layout.take<std::int32_t>(pairs);
  s.grouped_weight = layout.take<float>(rows * w.weighed);
  s.expert_first = layout.take<std::int32_t>(w.experts + 1);
  s.expert_ids = layout.take<std::int32_t>(w.experts);
  s.most_per_token = w.per_token;
  s.last_experts = layout.take<std::int32_t>(recipe.layers.size() * w.per_token);
  s.at_hand = layout.take<std::uint8_t>(w.experts);
  s.logits = layout.take<float>(static_cast<std::size_t>(s.logit_rows) * vocab);
  s.bytes = layout.bytes();
  return s;
}

}  // namespace edgert
