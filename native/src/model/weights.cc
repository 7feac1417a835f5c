#include "model/weights.h"

#include <algorithm>

#include "bundle/xxhash.h"
#include "model/split_expert.h"
#include "platform/error.h"
#include "storage/whole_file.h"

namespace edgert {
namespace {

constexpr std::size_t kMatrixAlignment = 64;

std::string manifest_path(const Bundle& bundle) { return (bundle.path() / "manifest.json").string(); }

std::string shape_text(std::size_t rows, std::size_t cols) {
  return "[" + std::to_string(rows) + ", " + std::to_string(cols) + "]";
}

// Files that hold dense tensors, each read whole: the writer puts nothing else in them.
std::vector<bool> dense_files(const Bundle& bundle) {
  std::vector<bool> dense(bundle.manifest().files.size());
  for (const auto& [name, tensor] : bundle.manifest().tensors) dense[tensor.extent.file] = true;
  return dense;
}

// The tensors of one file as they lie in it.
std::vector<std::pair<const std::string*, const TensorEntry*>> in_order(const Bundle& bundle,
                                                                        std::size_t file) {
  std::vector<std::pair<const std::string*, const TensorEntry*>> tensors;
  for (const auto& [name, tensor] : bundle.manifest().tensors) {
    if (tensor.extent.file == file) tensors.emplace_back(&name, &tensor);
  }
  std::sort(tensors.begin(), tensors.end(),
            [](const auto& a, const auto& b) { return a.second->extent.offset < b.second->extent.offset; });
  return tensors;
}

void check_experts(const Bundle& bundle, const Recipe& recipe) {
  const Manifest& manifest = bundle.manifest();
  const auto fail = [&](const std::string& message) {
    throw Error(ErrorKind::corrupt, manifest_path(bundle) + ": " + message);
  };
  std::size_t next = 0;
  for (int i = 0; i < recipe.num_layers(); ++i) {
    const FfnRecipe& ffn = recipe.block(i).ffn;
    if (!ffn.is_moe()) continue;
    const std::string layer = "layer " + std::to_string(i);
    if (next >= manifest.experts.size() || manifest.experts[next].layer != i)
      fail("the experts of " + layer + " are missing");
    const auto& experts = manifest.experts[next++].experts;
    if (experts.size() != static_cast<std::size_t>(ffn.num_experts)) {
      fail(layer + ": found " + std::to_string(experts.size()) + " experts, the recipe says " +
           std::to_string(ffn.num_experts));
    }
    for (std::size_t e = 0; e < experts.size(); ++e) {
      const ExpertFormats& formats = manifest.expert_formats[experts[e].formats];
      const std::string expert = layer + ": expert " + std::to_string(e);
      if (experts[e].is_split() && !base_formats(formats))
        fail(expert + " is split, which its formats cannot be");
      const auto hidden = static_cast<std::size_t>(recipe.hidden_size);
      const SplitLayout layout = experts[e].is_split()
                                     ? split_layout(formats, hidden, ffn)
                                     : SplitLayout{.bytes = expert_layout(formats, hidden, ffn).bytes};
      if (experts[e].extent.bytes != layout.bytes) {
        fail(expert + " has " + std::to_string(experts[e].extent.bytes) +
             " bytes, its shape and formats need " + std::to_string(layout.bytes));
      }
      if (experts[e].base_bytes != layout.base.bytes) {
        fail(expert + " has a base of " + std::to_string(experts[e].base_bytes) +
             " bytes, its shape and formats need " + std::to_string(layout.base.bytes));
      }
    }
  }
  if (next != manifest.experts.size())
    fail("experts of layer " + std::to_string(manifest.experts[next].layer) +
         ", which the recipe does not have");
}

}  // namespace

ExpertLayout expert_layout(const ExpertFormats& formats, std::size_t hidden_size, const FfnRecipe& ffn) {
  const auto intermediate_size = static_cast<std::size_t>(ffn.intermediate_size);
  ExpertLayout layout;
  layout.formats = formats;
  layout.up_offset =
      round_up(packed_bytes(format(formats.gate), intermediate_size, hidden_size), kMatrixAlignment);
  layout.down_offset =
      layout.up_offset +
      round_up(packed_bytes(format(formats.up), intermediate_size, hidden_size), kMatrixAlignment);
  layout.bias_offset =
      layout.down_offset + packed_bytes(format(formats.down), hidden_size, intermediate_size);
  layout.bytes = layout.bias_offset;
  if (ffn.expert_bias) layout.bytes += (2 * intermediate_size + hidden_size) * sizeof(float);
  return layout;
}

// Finds each tensor by name, checks its shape and counts the names used.
class Weights::Binder {
 public:
  Binder(const Bundle& bundle, const std::vector<Buffer>* files, Targets* targets, std::vector<Dense>* dense)
      : bundle_(bundle), files_(files), targets_(targets), dense_(dense) {}

  // One that products multiply with, which adapters can change.
  Matrix matrix(const std::string& name, int rows, int cols, bool must_be_f32 = false,
                bool vocabulary = false) {
    Matrix found = fixed_matrix(name, rows, cols, must_be_f32);
    if (targets_ == nullptr) return found;
    found.target = targets_->add(name, {found.rows, found.cols, Targets::Kind::matrix, vocabulary});
    dense_->resize(static_cast<std::size_t>(targets_->count()));
    dense_->back() = {found.format, address(entry(name))};
    return found;
  }

  Matrix fixed_matrix(const std::string& name, int rows, int cols, bool must_be_f32 = false) {
    const TensorEntry& tensor = entry(name);
    check(name, tensor,
          !tensor.is_vector && tensor.rows == static_cast<std::size_t>(rows) &&
              tensor.cols == static_cast<std::size_t>(cols),
          shape_text(static_cast<std::size_t>(rows), static_cast<std::size_t>(cols)));
    if (must_be_f32 && tensor.format != FormatId::f32) {
      throw Error(ErrorKind::unsupported, manifest_path(bundle_) + ": tensor '" + name + "' is " +
                                              std::string(format(tensor.format).name) + ", allowed: f32");
    }
    return {.format = tensor.format, .rows = tensor.rows, .cols = tensor.cols, .data = address(tensor)};
  }

  const float* vector(const std::string& name, int size) {
    const TensorEntry& tensor = entry(name);
    check(name, tensor, tensor.is_vector && tensor.cols == static_cast<std::size_t>(size),
          "[" + std::to_string(size) + "]");
    return reinterpret_cast<const float*>(address(tensor));
  }
  const float* vector_if(bool wanted, const std::string& name, int size) {
    return wanted ? vector(name, size) : nullptr;
  }

  // Rows that adapters give tokens that are none of the vocabulary.
  int given(const std::string& name, int size) {
    if (targets_ == nullptr) return -1;
    return targets_->add(name, {0, static_cast<std::size_t>(size), Targets::Kind::table});
  }

  NormWeights norm(Norm kind, const std::string& name, int size) {
    NormWeights found{vector(name, size), vector_if(kind == Norm::layer, name + "_bias", size)};
    if (targets_ != nullptr)
      found.target = targets_->add(name, {1, static_cast<std::size_t>(size), Targets::Kind::norm});
    return found;
  }

  GatedFfnWeights gated_ffn(const std::string& prefix, int hidden, int intermediate) {
    return {matrix(prefix + "gate", intermediate, hidden), matrix(prefix + "up", intermediate, hidden),
            matrix(prefix + "down", hidden, intermediate)};
  }

  void finish() {
    if (used_.size() == bundle_.manifest().tensors.size()) return;
    std::sort(used_.begin(), used_.end());
    for (const auto& [name, tensor] : bundle_.manifest().tensors) {
      if (!std::binary_search(used_.begin(), used_.end(), &tensor)) {
        throw Error(ErrorKind::corrupt,
                    manifest_path(bundle_) + ": tensor '" + name + "' has no place in the recipe");
      }
    }
  }

 private:
  const TensorEntry& entry(const std::string& name) {
    const TensorEntry& tensor = bundle_.tensor(name);
    used_.push_back(&tensor);
    return tensor;
  }
  void check(const std::string& name, const TensorEntry& tensor, bool good, const std::string& wanted) const {
    if (good) return;
    const std::string found =
        tensor.is_vector ? "[" + std::to_string(tensor.cols) + "]" : shape_text(tensor.rows, tensor.cols);
    throw Error(ErrorKind::corrupt, manifest_path(bundle_) + ": tensor '" + name + "' has shape " + found +
                                        ", the recipe needs " + wanted);
  }
  std::byte* address(const TensorEntry& tensor) const {
    return files_ == nullptr ? nullptr : (*files_)[tensor.extent.file].data() + tensor.extent.offset;
  }

  const Bundle& bundle_;
  const std::vector<Buffer>* files_;  // null: check only
  Targets* targets_;                  // null: nobody asks
  std::vector<Dense>* dense_;
  std::vector<const TensorEntry*> used_;
};

namespace {

template <typename Binder>
AttentionWeights bind_mixer(Binder& binder, const AttentionRecipe& a, const std::string& layer, int hidden) {
  const std::string prefix = layer + "attention.";
  const int q_rows = a.num_heads * a.head_dim;
  const int kv_rows = a.num_kv_heads * a.head_dim;
  const bool normed = a.qk_norm == QkNorm::head || a.qk_norm == QkNorm::row;
  const bool by_row = a.qk_norm == QkNorm::row;
  return {
      .q = binder.matrix(prefix + "q", q_rows, hidden),
      .k = binder.matrix(prefix + "k", kv_rows, hidden),
      .v = a.values_are_keys ? Matrix{} : binder.matrix(prefix + "v", kv_rows, hidden),
      .o = binder.matrix(prefix + "o", hidden, q_rows),
      .gate = a.output_gate ? std::optional(binder.matrix(prefix + "gate", q_rows, hidden)) : std::nullopt,
      .q_bias = binder.vector_if(a.qkv_bias, prefix + "q_bias", q_rows),
      .k_bias = binder.vector_if(a.qkv_bias, prefix + "k_bias", kv_rows),
      .v_bias = binder.vector_if(a.qkv_bias && !a.values_are_keys, prefix + "v_bias", kv_rows),
      .o_bias = binder.vector_if(a.output_bias, prefix + "o_bias", hidden),
      .gate_bias = binder.vector_if(a.output_gate && a.qkv_bias, prefix + "gate_bias", q_rows),
      .q_norm = binder.vector_if(normed, prefix + "q_norm", by_row ? q_rows : a.head_dim),
      .k_norm = binder.vector_if(normed, prefix + "k_norm", by_row ? kv_rows : a.head_dim),
      .sinks = binder.vector_if(a.sinks, prefix + "sinks", a.num_heads),
      .given_keys = binder.given(prefix + "given_keys", kv_rows),
      .given_values = binder.given(prefix + "given_values", kv_rows)};
}

template <typename Binder>
LatentAttentionWeights bind_mixer(Binder& binder, const LatentAttentionRecipe& a, const std::string& layer,
                                  int hidden) {
  const std::string prefix = layer + "attention.";
  LatentAttentionWeights w;
  if (a.q_rank) {
    w.q_a = binder.matrix(prefix + "q_a", *a.q_rank, hidden);
    w.q_a_norm = binder.vector(prefix + "q_a_norm", *a.q_rank);
    w.q_a_bias = binder.vector_if(a.qkv_bias, prefix + "q_a_bias", *a.q_rank);
  }
  w.q = binder.matrix(prefix + (a.q_rank ? "q_b" : "q"), a.num_heads * a.query_dim(),
                      a.q_rank.value_or(hidden));
  w.kv_a = binder.matrix(prefix + "kv_a", a.key_dim(), hidden);
  w.kv_a_norm = binder.vector(prefix + "kv_a_norm", a.kv_rank);
  w.kv_a_bias = binder.vector_if(a.qkv_bias, prefix + "kv_a_bias", a.key_dim());
  w.k_b = binder.fixed_matrix(prefix + "k_b", a.num_heads * a.kv_rank, a.nope_head_dim);
  w.v_b = binder.fixed_matrix(prefix + "v_b", a.num_heads * a.value_head_dim, a.kv_rank);
  w.o = binder.matrix(prefix + "o", hidden, a.num_heads * a.value_head_dim);
  w.o_bias = binder.vector_if(a.output_bias, prefix + "o_bias", hidden);
  return w;
}

template <typename Binder>
GatedDeltaWeights bind_mixer(Binder& binder, const GatedDeltaRecipe& d, const std::string& layer,
                             int hidden) {
  const std::string prefix = layer + "delta.";
  return {.q = binder.matrix(prefix + "q", d.keys(), hidden),
          .k = binder.matrix(prefix + "k", d.keys(), hidden),
          .v = binder.matrix(prefix + "v", d.values(), hidden),
          .z = binder.matrix(prefix + "z", d.values(), hidden),
          .o = binder.matrix(prefix + "o", hidden, d.values()),
          .a = binder.matrix(prefix + "a", d.num_value_heads, hidden, true),
          .b = binder.matrix(prefix + "b", d.num_value_heads, hidden, true),
          .conv = binder.fixed_matrix(prefix + "conv", d.channels(), d.conv_kernel, true),
          .decay = binder.vector(prefix + "decay", d.num_value_heads),
          .dt_bias = binder.vector(prefix + "dt_bias", d.num_value_heads),
          .norm = binder.vector(prefix + "norm", d.value_head_dim)};
}

template <typename Binder>
ShortConvWeights bind_mixer(Binder& binder, const ShortConvRecipe& c, const std::string& layer, int hidden) {
  const std::string prefix = layer + "conv.";
  return {.in = binder.matrix(prefix + "in", 3 * hidden, hidden),
          .o = binder.matrix(prefix + "o", hidden, hidden),
          .conv = binder.fixed_matrix(prefix + "conv", hidden, c.conv_kernel, true),
          .in_bias = binder.vector_if(c.bias, prefix + "in_bias", 3 * hidden),
          .bias = binder.vector_if(c.bias, prefix + "bias", hidden),
          .o_bias = binder.vector_if(c.bias, prefix + "o_bias", hidden)};
}

template <typename Binder>
LayerWeights bind_layer(Binder& binder, const Recipe& recipe, int index) {
  const BlockRecipe& block = recipe.block(index);
  const FfnRecipe& ffn = block.ffn;
  const int hidden = recipe.hidden_size;
  const std::string prefix = "layers." + std::to_string(index) + ".";
  LayerWeights layer;
  layer.attention_norm = binder.norm(block.norm, prefix + "attention_norm", hidden);
  layer.mixer =
      std::visit([&](const auto& mixer) -> MixerWeights { return bind_mixer(binder, mixer, prefix, hidden); },
                 block.mixer);
  layer.ffn_norm = binder.norm(block.norm, prefix + "ffn_norm", hidden);
  layer.attention_post_norm = binder.vector_if(block.post_norms, prefix + "attention_post_norm", hidden);
  layer.ffn_post_norm = binder.vector_if(block.post_norms, prefix + "ffn_post_norm", hidden);
  layer.scale = binder.vector_if(block.scaled, prefix + "scale", 1);
  if (!ffn.is_moe()) {
    layer.dense = binder.gated_ffn(prefix + "ffn.", hidden, ffn.intermediate_size);
    return layer;
  }
  layer.router = binder.matrix(prefix + "router", ffn.num_experts, hidden, true);
  layer.router_bias =
      binder.vector_if(ffn.router.bias != RouterBias::none, prefix + "router.bias", ffn.num_experts);
  layer.expert_scale =
      binder.vector_if(ffn.router.expert_scale, prefix + "router.expert_scale", ffn.num_experts);
  layer.router_norm = binder.vector_if(ffn.branch_norms, prefix + "router_norm", hidden);
  layer.experts_norm = binder.vector_if(ffn.branch_norms, prefix + "experts_norm", hidden);
  layer.experts_post_norm = binder.vector_if(ffn.branch_norms, prefix + "experts_post_norm", hidden);
  if (ffn.shared) {
    layer.shared_post_norm = binder.vector_if(ffn.branch_norms, prefix + "shared.post_norm", hidden);
    layer.dense = binder.gated_ffn(prefix + "shared.", hidden, ffn.shared->intermediate_size);
    if (ffn.shared->sigmoid_gate)
      layer.shared_router = binder.matrix(prefix + "shared.router", 1, hidden, true);
  }
  return layer;
}

}  // namespace

std::uint64_t Weights::resident_bytes(const Bundle& bundle, const Recipe& recipe) {
  Binder binder(bundle, nullptr, nullptr, nullptr);
  binder.fixed_matrix("embedding", recipe.vocab_size, recipe.hidden_size);
  if (!recipe.tied_output) binder.matrix("output", recipe.vocab_size, recipe.hidden_size);
  binder.vector_if(recipe.output_bias, "output_bias", recipe.vocab_size);
  binder.norm(recipe.final_norm, "final_norm", recipe.hidden_size);
  for (int i = 0; i < recipe.num_layers(); ++i) bind_layer(binder, recipe, i);
  binder.finish();
  check_experts(bundle, recipe);
  std::uint64_t bytes = 0;
  const std::vector<bool> dense = dense_files(bundle);
  for (std::size_t i = 0; i < dense.size(); ++i) {
    if (dense[i]) bytes += round_up(bundle.manifest().files[i].bytes, page_size());
  }
  return bytes;
}

Weights::Weights(const Bundle& bundle, const Recipe& recipe, std::shared_ptr<Budget> budget, Reader& reader,
                 const std::function<void()>& poll) {
  read(bundle, std::move(budget), reader, poll);
  Targets targets;
  Binder binder(bundle, &files_, &targets, &dense_);
  embedding_ = binder.fixed_matrix("embedding", recipe.vocab_size, recipe.hidden_size);
  embedding_.target =
      targets.add("embedding", {embedding_.rows, embedding_.cols, Targets::Kind::table, true});
  output_ = recipe.tied_output ? embedding_
                               : binder.matrix("output", recipe.vocab_size, recipe.hidden_size, false, true);
  if (recipe.tied_output)
    output_.target = targets.add("output", {output_.rows, output_.cols, Targets::Kind::matrix, true});
  output_bias_ = binder.vector_if(recipe.output_bias, "output_bias", recipe.vocab_size);
  final_norm_ = binder.norm(recipe.final_norm, "final_norm", recipe.hidden_size);
  for (int i = 0; i < recipe.num_layers(); ++i) layers_.push_back(bind_layer(binder, recipe, i));
  for (int i = 0; i < recipe.num_layers(); ++i) {
    const FfnRecipe& ffn = recipe.block(i).ffn;
    if (!ffn.is_moe()) continue;
    targets.add_experts(i, ffn.num_experts, static_cast<std::size_t>(recipe.hidden_size),
                        static_cast<std::size_t>(ffn.intermediate_size));
  }
  targets_ = std::make_shared<const Targets>(std::move(targets));
}

// Each tensor is checked while those behind it are read.
void Weights::read(const Bundle& bundle, std::shared_ptr<Budget> budget, Reader& reader,
                   const std::function<void()>& poll) {
  const std::vector<bool> dense = dense_files(bundle);
  for (std::size_t i = 0; i < dense.size(); ++i) {
    Buffer& buffer = files_.emplace_back();
    if (!dense[i]) continue;
    const auto& file = bundle.file(static_cast<std::uint32_t>(i));
    buffer = Buffer(budget, file->bytes(), "dense weights");
    WholeFile arriving(file, reader, buffer.span());
    for (const auto& [name, tensor] : in_order(bundle, i)) {
      arriving.wait_for(tensor->extent.offset + tensor->extent.bytes, poll);
      check(bundle, i, *name, *tensor, "; convert or copy the bundle again");
    }
    arriving.wait_for(file->bytes(), poll);
    bytes_read_ += file->bytes();
  }
}

void Weights::check(const Bundle& bundle, std::size_t file, const std::string& name,
                    const TensorEntry& tensor, const std::string& advice) const {
  const Extent& e = tensor.extent;
  if (xxh64(std::span<const std::byte>(files_[file].span().subspan(e.offset, e.bytes))) == e.checksum) return;
  throw Error(ErrorKind::corrupt, bundle.file(static_cast<std::uint32_t>(file))->path().string() +
                                      ": tensor '" + name + "' at offset " + std::to_string(e.offset) + " (" +
                                      std::to_string(e.bytes) + " bytes): checksum differs" + advice);
}

std::size_t Weights::check(const Bundle& bundle) const {
  for (std::size_t i = 0; i < files_.size(); ++i) {
    if (!files_[i]) continue;
    for (const auto& [name, tensor] : in_order(bundle, i)) check(bundle, i, *name, *tensor, " in memory");
  }
  return bundle.manifest().tensors.size();
}

}  // namespace edgert
