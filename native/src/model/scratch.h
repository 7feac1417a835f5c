// Working memory of one step, laid out once for the largest step and charged to the budget.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"
#include "model/recipe.h"

namespace edgert {

struct ScratchShape {
  int rows = 0;  // of a step
  int threads = 0;
  std::int64_t context = 0;
  KvType kv_type = KvType::f16;
};

// Consecutive rows of a sequence that attend together, where `group` query heads share a KV head.
constexpr int attention_rows(int group) { return group < 8 ? 8 / group : 1; }

// Query heads of a latent attention that one thread attends with, where they share all keys.
int latent_group(int heads, int threads);

struct Scratch {
  // Lays everything out from `base`; with a null base only `bytes` means anything.
  static Scratch layout(const Recipe& recipe, const ScratchShape& shape, std::byte* base);

  std::size_t bytes = 0;
  int logit_rows = 0;  // rows of `logits`

  float* x = nullptr;       // [rows][hidden], the residual stream
  float* normed = nullptr;  // [rows][hidden]
  float* q = nullptr;  // [rows][heads * head_dim], the largest layer's; likewise what other mixers project
  float* k = nullptr;
  float* v = nullptr;
  float* wide = nullptr;              // [rows][...], gates of the heads, or queries in a latent space
  float* mixed = nullptr;             // [rows][heads * head_dim], or what another mixer makes
  float* gates = nullptr;             // [rows][2][value heads], of a delta net: decay and beta
  std::int32_t* head_rows = nullptr;  // [heads][rows], of latent attention: row * heads + head
  float* rotation = nullptr;          // [rows][2][head_dim / 2], cos and sin
  float* attention = nullptr;         // [threads][attention_floats]
  std::size_t attention_floats = 0;
  QuantizedRows inputs;                  // of normed or mixed
  QuantizedRows inner;                   // of gate
  std::size_t group_rows = 0;            // experts are computed together until they have so many rows
  float* gate = nullptr;                 // [group_rows + rows][intermediate]
  float* up = nullptr;                   // likewise
  float* projected = nullptr;            // [rows][hidden]
  float* router = nullptr;               // [rows][experts]
  float* router_input = nullptr;         // [hidden], of the last row
  float* router_space = nullptr;         // [rows][router_space]
  float* expert_out = nullptr;           // [rows * per_token][hidden]
  float* pair_weight = nullptr;          // [rows * per_token], by row, ascending expert id
  std::int32_t* pair_expert = nullptr;   // [rows * per_token], likewise
  std::int32_t* pair_slot = nullptr;     // [rows * per_token], row of expert_out, likewise
  std::int32_t* grouped_rows = nullptr;  // [rows * per_token], activation rows grouped by expert
  float* grouped_weight = nullptr;       // [rows * per_token], likewise; where a router weighs the input
  std::int32_t* expert_first = nullptr;  // [experts + 1], start of each expert's group
  std::int32_t* expert_ids = nullptr;    // [experts], those in use
  std::int32_t* last_experts = nullptr;  // [layers][most_per_token], of the last row
  std::size_t most_per_token = 0;
  std::uint8_t* at_hand = nullptr;  // [experts], whether one need not be read
  float* logits = nullptr;          // [logit_rows][vocab]
};

}  // namespace edgert
