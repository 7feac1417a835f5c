// The declarative description of a decoder, from the manifest. docs/bundle-format.md is its definition.
//
// Plain values, checked once: after parse_recipe every size is positive and every relation that the decoder
// relies on holds. Unknown operations are Error{unsupported} by name; impossible values are Error{corrupt}.
#pragma once

#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "bundle/bundle.h"
#include "bundle/json.h"

namespace edgert {

enum class QkNorm { none, head, row, unit };
enum class RopeLayout { half, interleaved };

struct RopeRecipe {
  RopeLayout layout = RopeLayout::half;
  std::vector<float> inv_freq;
  float attention_factor = 1;
  struct Long {
    std::int64_t beyond = 0;
    std::vector<float> inv_freq;
    float attention_factor = 1;
    bool operator==(const Long&) const = default;
  };
  std::optional<Long> long_context;  // instead, where the model is loaded for a longer one
  bool operator==(const RopeRecipe&) const = default;
};

struct AttentionRecipe {
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  float scale = 1;
  bool qkv_bias = false;
  bool output_bias = false;
  QkNorm qk_norm = QkNorm::none;
  std::optional<float> clip_qkv;
  std::optional<int> window;
  std::optional<int> chunk;
  bool sinks = false;
  struct Temperature {
    float floor = 1;
    float scale = 0;
    float offset = 1;
  };
  std::optional<Temperature> temperature;
  bool values_are_keys = false;  // as projected, before norm and rotation
  bool value_norm = false;
  std::optional<RopeRecipe> rope;
  bool output_gate = false;  // the heads' output is multiplied by a sigmoid
};

// Attention over one latent row and one rotated key part a token, shared by all heads.
struct LatentAttentionRecipe {
  int num_heads = 0;
  std::optional<int> q_rank;
  int kv_rank = 0;
  int nope_head_dim = 0;
  int rope_head_dim = 0;
  int value_head_dim = 0;
  float scale = 1;
  bool qkv_bias = false;
  bool output_bias = false;
  float norm_eps = 1e-6F;
  RopeRecipe rope;

  int query_dim() const noexcept { return nope_head_dim + rope_head_dim; }  // of a head, as projected
  int key_dim() const noexcept { return kv_rank + rope_head_dim; }          // as attended to
};

struct GatedDeltaRecipe {
  int num_key_heads = 0;
  int num_value_heads = 0;
  int key_head_dim = 0;
  int value_head_dim = 0;
  int conv_kernel = 0;
  float norm_eps = 1e-6F;
  bool tiled = false;  // value heads of one key head are num_key_heads apart, not side by side

  int key_head(int value_head) const noexcept {
    return tiled ? value_head % num_key_heads : value_head / (num_value_heads / num_key_heads);
  }
  int keys() const noexcept { return num_key_heads * key_head_dim; }  // of a row; as many queries
  int values() const noexcept { return num_value_heads * value_head_dim; }
  int channels() const noexcept { return 2 * keys() + values(); }  // of the convolution
};

struct ShortConvRecipe {
  int conv_kernel = 0;
  bool bias = false;
};

using MixerRecipe = std::variant<AttentionRecipe, LatentAttentionRecipe, GatedDeltaRecipe, ShortConvRecipe>;

enum class Scoring { softmax, sigmoid, sparsemixer };
enum class RouterBias { none, logits, selection };
enum class GroupScore { max, sum_of_top_2 };

struct ExpertGroups {
  int count = 1;
  int keep = 1;
  GroupScore score = GroupScore::max;
};

struct RouterRecipe {
  Scoring scoring = Scoring::softmax;
  RouterBias bias = RouterBias::none;
  std::optional<ExpertGroups> groups;
  bool normalize = false;
  float norm_epsilon = 0;
  float norm_minimum = 0;
  float scale = 1;
  float jitter = 0;           // of the sparsemixer
  bool weighs_input = false;  // of an expert, instead of its output
  bool expert_scale = false;
  bool chooses_apart() const noexcept { return bias == RouterBias::selection || groups; }
};

struct SharedExpertRecipe {
  int intermediate_size = 0;
  bool sigmoid_gate = false;
};

enum class Activation { silu, gelu_tanh, clamped_swiglu };

struct FfnRecipe {
  int intermediate_size = 0;  // of the dense ffn, or of one expert
  int num_experts = 0;        // 0: dense
  int num_experts_per_tok = 0;
  Activation activation = Activation::silu;
  float activation_alpha = 1;  // of clamped_swiglu
  float activation_limit = 0;
  bool expert_bias = false;
  bool branch_norms = false;  // router, routed and shared experts have norms of their own
  RouterRecipe router;
  std::optional<SharedExpertRecipe> shared;
  bool is_moe() const noexcept { return num_experts > 0; }
};

enum class Norm { rms, layer };

struct BlockRecipe {
  Norm norm = Norm::rms;
  bool post_norms = false;
  bool scaled = false;
  float norm_eps = 1e-6F;
  float residual_scale = 1;
  MixerRecipe mixer;
  FfnRecipe ffn;
};

struct Recipe {
  std::string architecture;
  int hidden_size = 0;
  int vocab_size = 0;
  int context_length = 0;
  float embedding_scale = 1;
  bool tied_output = false;
  float output_scale = 1;
  bool output_bias = false;
  float output_softcap = 0;  // 0: none
  Norm final_norm = Norm::rms;
  float final_norm_eps = 1e-6F;
  std::vector<BlockRecipe> blocks;
  std::vector<int> layers;  // index into blocks

  int num_layers() const noexcept { return static_cast<int>(layers.size()); }
  const BlockRecipe& block(int layer) const {
    return blocks[static_cast<std::size_t>(layers[static_cast<std::size_t>(layer)])];
  }
};

// `where` names the recipe in messages.
Recipe parse_recipe(const Json& json, const std::string& where);
Recipe recipe_of(const Bundle& bundle);

}  // namespace edgert
