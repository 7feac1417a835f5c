// A model's dense weights, resident, bound to the names that the recipe implies.
//
// Threads: immutable after load, but for codes of matrices that adapters patch between steps. Ownership:
// views point into the weights' own buffer.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <variant>
#include <vector>

#include "adapters/targets.h"
#include "bundle/bundle.h"
#include "model/recipe.h"
#include "platform/memory.h"
#include "storage/reader.h"

namespace edgert {

struct Matrix {
  FormatId format = FormatId::f32;
  std::size_t rows = 0;
  std::size_t cols = 0;
  const std::byte* data = nullptr;
  int target = -1;  // of adapters; none
};

struct AttentionWeights {
  Matrix q, k, v, o;
  std::optional<Matrix> gate;
  const float* q_bias = nullptr;  // null where the recipe has none
  const float* k_bias = nullptr;
  const float* v_bias = nullptr;
  const float* o_bias = nullptr;
  const float* gate_bias = nullptr;
  const float* q_norm = nullptr;
  const float* k_norm = nullptr;
  const float* sinks = nullptr;
  int given_keys = -1;  // of soft prompts' tokens, as targets of adapters
  int given_values = -1;
};

struct LatentAttentionWeights {
  std::optional<Matrix> q_a;
  Matrix q;  // q_b where there is q_a
  Matrix kv_a;
  Matrix k_b;  // each head's [kv_rank, nope_head_dim], one below the other
  Matrix v_b;  // each head's [value_head_dim, kv_rank]
  Matrix o;
  const float* q_a_norm = nullptr;
  const float* kv_a_norm = nullptr;
  const float* q_a_bias = nullptr;  // null where the recipe has none
  const float* kv_a_bias = nullptr;
  const float* o_bias = nullptr;
};

struct GatedDeltaWeights {
  Matrix q, k, v, z, o;
  Matrix a, b, conv;  // f32
  const float* decay = nullptr;
  const float* dt_bias = nullptr;
  const float* norm = nullptr;
};

struct ShortConvWeights {
  Matrix in, o;
  Matrix conv;  // f32
  const float* in_bias = nullptr;
  const float* bias = nullptr;
  const float* o_bias = nullptr;
};

using MixerWeights =
    std::variant<AttentionWeights, LatentAttentionWeights, GatedDeltaWeights, ShortConvWeights>;

struct GatedFfnWeights {
  Matrix gate, up, down;
};

struct NormWeights {
  const float* weight = nullptr;
  const float* bias = nullptr;  // of a layer norm
  int target = -1;              // of adapters; none
};

struct LayerWeights {
  NormWeights attention_norm;
  MixerWeights mixer;
  NormWeights ffn_norm;
  std::optional<GatedFfnWeights> dense;  // a dense ffn, or the shared expert
  Matrix router;                         // of an MoE
  const float* router_bias = nullptr;    // null where the recipe has none, as those that follow
  const float* expert_scale = nullptr;
  const float* router_norm = nullptr;
  const float* experts_norm = nullptr;
  const float* experts_post_norm = nullptr;
  const float* shared_post_norm = nullptr;
  const float* attention_post_norm = nullptr;
  const float* ffn_post_norm = nullptr;
  const float* scale = nullptr;
  std::optional<Matrix> shared_router;
};

// Where an expert's matrices lie inside its extent, by combination of formats.
struct ExpertLayout {
  ExpertFormats formats;
  std::size_t up_offset = 0;
  std::size_t down_offset = 0;
  std::size_t bias_offset = 0;  // of gate, up and down, one after the other, where the recipe has them
  std::size_t bytes = 0;
};
ExpertLayout expert_layout(const ExpertFormats& formats, std::size_t hidden_size, const FfnRecipe& ffn);

class Weights {
 public:
  // Checks names and shapes of everything the recipe needs (and that nothing is left over), then reads and
  // checks the dense tensors. Error{corrupt} names the tensor. `poll` is called now and then and may throw;
  // may be null.
  Weights(const Bundle& bundle, const Recipe& recipe, std::shared_ptr<Budget> budget, Reader& reader,
          const std::function<void()>& poll);

  // Bytes that loading charges; checks the same without reading.
  static std::uint64_t resident_bytes(const Bundle& bundle, const Recipe& recipe);

  const Matrix& embedding() const noexcept { return embedding_; }
  const Matrix& output() const noexcept { return output_; }
  const float* output_bias() const noexcept { return output_bias_; }
  const NormWeights& final_norm() const noexcept { return final_norm_; }
  const std::shared_ptr<const Targets>& targets() const noexcept { return targets_; }
  // Dense ones come first; those from this number on have no codes of their own.
  int dense_targets() const noexcept { return static_cast<int>(dense_.size()); }
  FormatId format_of(int target) const noexcept { return dense_[static_cast<std::size_t>(target)].format; }
  // The packed matrix; null where it is something else as well, as a head that is tied to the embedding.
  std::byte* codes(int target) const noexcept { return dense_[static_cast<std::size_t>(target)].codes; }
  // Compares what is here with the bundle's checksums; how many tensors. Error{corrupt} names what differs.
  std::size_t check(const Bundle& bundle) const;
  const LayerWeights& layer(int i) const { return layers_[static_cast<std::size_t>(i)]; }
  std::uint64_t bytes_read() const noexcept { return bytes_read_; }

 private:
  class Binder;
  void check(const Bundle& bundle, std::size_t file, const std::string& name, const TensorEntry& tensor,
             const std::string& advice) const;
  void read(const Bundle& bundle, std::shared_ptr<Budget> budget, Reader& reader,
            const std::function<void()>& poll);

  std::vector<Buffer> files_;  // by file index; empty where a file holds no dense tensor
  Matrix embedding_, output_;
  const float* output_bias_ = nullptr;
  NormWeights final_norm_;
  std::vector<LayerWeights> layers_;
  std::shared_ptr<const Targets> targets_;
  struct Dense {
    FormatId format = FormatId::f32;
    std::byte* codes = nullptr;
  };
  std::vector<Dense> dense_;  // by target
  std::uint64_t bytes_read_ = 0;
};

}  // namespace edgert
