#include "model/recipe.h"

#include <cmath>
#include <limits>

#include "model/recipe_parse.h"
#include "platform/error.h"

namespace edgert {
namespace {

constexpr std::int64_t kMaxLayers = 1 << 16;

}  // namespace

void unsupported(const JsonField& field, const std::string& what, const std::string& known) {
  throw Error(ErrorKind::unsupported, field.path() + ": " + what + " '" + excerpt(field.as_string()) +
                                          "' is not built in this version of edgert; known: " + known);
}

int positive(const JsonField& field, std::int64_t maximum) {
  return static_cast<int>(field.as_integer(1, maximum));
}

float real(const JsonField& field) {
  const double value = field.as_number();
  if (std::fabs(value) > static_cast<double>(std::numeric_limits<float>::max()))
    field.fail("a number that an f32 holds");
  return static_cast<float>(value);
}

RopeRecipe parse_rope(const JsonField& field, int head_dim) {
  JsonObject object(field);
  RopeRecipe rope;
  const JsonField layout = object.take("layout");
  if (layout.as_string() == "half") {
    rope.layout = RopeLayout::half;
  } else if (layout.as_string() == "interleaved") {
    rope.layout = RopeLayout::interleaved;
  } else {
    unsupported(layout, "rope layout", "half, interleaved");
  }
  const JsonField frequencies = object.take("inv_freq");
  if (frequencies.size() == 0 || 2 * frequencies.size() > static_cast<std::size_t>(head_dim)) {
    frequencies.fail("1 to head_dim/2 = " + std::to_string(head_dim / 2) + " frequencies");
  }
  for (std::size_t i = 0; i < frequencies.size(); ++i) rope.inv_freq.push_back(real(frequencies[i]));
  rope.attention_factor = real(object.take("attention_factor"));
  object.finish();
  return rope;
}

AttentionRecipe parse_attention(JsonObject object) {
  AttentionRecipe a;
  a.num_heads = positive(object.take("num_heads"), 1 << 12);
  const JsonField kv_heads = object.take("num_kv_heads");
  a.num_kv_heads = positive(kv_heads, a.num_heads);
  if (a.num_heads % a.num_kv_heads != 0)
    kv_heads.fail("a divisor of num_heads = " + std::to_string(a.num_heads));
  a.head_dim = positive(object.take("head_dim"), 512);
  a.scale = real(object.take("scale"));
  a.qkv_bias = object.take("qkv_bias").as_bool();
  a.output_bias = object.take("output_bias").as_bool();
  if (const JsonField norm = object.take("qk_norm"); !norm.is_null()) {
    if (norm.as_string() == "head") {
      a.qk_norm = QkNorm::head;
    } else if (norm.as_string() == "row") {
      a.qk_norm = QkNorm::row;
    } else {
      unsupported(norm, "qk_norm", "head, row, null");
    }
  }
  if (const JsonField clip = object.take("clip_qkv"); !clip.is_null()) {
    a.clip_qkv = real(clip);
    if (*a.clip_qkv <= 0) clip.fail("a positive number or null");
  }
  if (const JsonField window = object.take("window"); !window.is_null()) a.window = positive(window, 1 << 30);
  if (const JsonField rope = object.take("rope"); !rope.is_null()) a.rope = parse_rope(rope, a.head_dim);
  if (object.has("output_gate")) a.output_gate = object.take("output_gate").as_bool();
  object.finish();
  return a;
}

void require_silu(const JsonField& activation) {
  if (activation.as_string() != "silu") unsupported(activation, "activation", "silu");
}

namespace {

RouterRecipe parse_router(const JsonField& field) {
  JsonObject object(field);
  RouterRecipe router;
  if (const JsonField scoring = object.take("scoring"); scoring.as_string() != "softmax") {
    unsupported(scoring, "router scoring", "softmax");
  }
  router.normalize = object.take("normalize").as_bool();
  router.scale = real(object.take("scale"));
  object.finish();
  return router;
}

SharedExpertRecipe parse_shared(const JsonField& field) {
  JsonObject object(field);
  SharedExpertRecipe shared;
  shared.intermediate_size = positive(object.take("intermediate_size"));
  if (const JsonField gate = object.take("gate"); !gate.is_null()) {
    if (gate.as_string() != "sigmoid") unsupported(gate, "gate of the shared expert", "sigmoid, null");
    shared.sigmoid_gate = true;
  }
  object.finish();
  return shared;
}

FfnRecipe parse_ffn(const JsonField& field) {
  JsonObject object(field);
  FfnRecipe ffn;
  const JsonField kind = object.take("kind");
  if (kind.as_string() == "dense") {
    ffn.intermediate_size = positive(object.take("intermediate_size"));
  } else if (kind.as_string() == "moe") {
    ffn.intermediate_size = positive(object.take("moe_intermediate_size"));
    ffn.num_experts = positive(object.take("num_experts"), 1 << 16);
    ffn.num_experts_per_tok = positive(object.take("num_experts_per_tok"), ffn.num_experts);
    ffn.router = parse_router(object.take("router"));
    if (const JsonField shared = object.take("shared"); !shared.is_null()) ffn.shared = parse_shared(shared);
  } else {
    unsupported(kind, "ffn", "dense, moe");
  }
  require_silu(object.take("activation"));
  object.finish();
  return ffn;
}

BlockRecipe parse_block(const JsonField& field) {
  JsonObject object(field);
  BlockRecipe block;
  block.norm_eps = real(object.take("norm_eps"));
  block.residual_scale = real(object.take("residual_scale"));
  block.mixer = parse_mixer(object.take("mixer"));
  block.ffn = parse_ffn(object.take("ffn"));
  object.finish();
  return block;
}

}  // namespace

Recipe recipe_of(const Bundle& bundle) {
  return parse_recipe(bundle.manifest().recipe, (bundle.path() / "manifest.json").string() + ".recipe");
}

Recipe parse_recipe(const Json& json, const std::string& where) {
  JsonObject root(JsonField(json, where));
  Recipe recipe;
  if (const JsonField version = root.take("version"); version.as_integer(1, 1 << 30) != 1) {
    throw Error(ErrorKind::unsupported, version.path() + ": newer than this edgert reads (1); update edgert");
  }
  recipe.architecture = root.take("architecture").as_string();
  recipe.hidden_size = positive(root.take("hidden_size"));
  recipe.vocab_size = positive(root.take("vocab_size"));
  recipe.context_length = positive(root.take("context_length"), 1 << 30);
  JsonObject embedding(root.take("embedding"));
  recipe.embedding_scale = real(embedding.take("scale"));
  embedding.finish();
  JsonObject output(root.take("output"));
  recipe.tied_output = output.take("tied").as_bool();
  recipe.output_scale = real(output.take("scale"));
  output.finish();
  recipe.final_norm_eps = real(root.take("final_norm_eps"));

  const JsonField blocks = root.take("blocks");
  if (blocks.size() == 0 || blocks.size() > static_cast<std::size_t>(kMaxLayers))
    blocks.fail("1 to 65536 blocks");
  for (std::size_t i = 0; i < blocks.size(); ++i) recipe.blocks.push_back(parse_block(blocks[i]));
  const JsonField layers = root.take("layers");
  if (layers.size() == 0 || layers.size() > static_cast<std::size_t>(kMaxLayers))
    layers.fail("1 to 65536 layers");
  for (std::size_t i = 0; i < layers.size(); ++i) {
    recipe.layers.push_back(
        static_cast<int>(layers[i].as_integer(0, static_cast<std::int64_t>(blocks.size()) - 1)));
  }
  root.finish();
  return recipe;
}

}  // namespace edgert
