#include "model/recipe.h"

#include <cmath>
#include <limits>
#include <utility>

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

bool flag(JsonObject& object, std::string_view key) { return object.has(key) && object.take(key).as_bool(); }

namespace {

template <typename T>
using Names = std::initializer_list<std::pair<std::string_view, T>>;

template <typename T>
T one_of(const JsonField& field, const std::string& what, Names<T> known) {
  std::string names;
  for (const auto& [name, value] : known) {
    if (field.as_string() == name) return value;
    names += (names.empty() ? "" : ", ") + std::string(name);
  }
  unsupported(field, what, names);
}
template <typename T>
T one_of(JsonObject& object, std::string_view key, const std::string& what, T absent, Names<T> known) {
  return object.has(key) ? one_of<T>(object.take(key), what, known) : absent;
}

Norm parse_norm(JsonObject& object, std::string_view key) {
  return one_of<Norm>(object, key, "norm", Norm::rms, {{"rms", Norm::rms}, {"layer", Norm::layer}});
}

float non_negative(JsonObject& object, std::string_view key) {
  if (!object.has(key)) return 0;
  const JsonField field = object.take(key);
  const float value = real(field);
  if (value < 0) field.fail("a number that is not negative");
  return value;
}

std::vector<float> reals(const JsonField& field) {
  std::vector<float> values;
  for (std::size_t i = 0; i < field.size(); ++i) values.push_back(real(field[i]));
  return values;
}

}  // namespace

RopeRecipe parse_rope(const JsonField& field, int head_dim) {
  JsonObject object(field);
  RopeRecipe rope;
  rope.layout = one_of<RopeLayout>(object.take("layout"), "rope layout",
                                   {{"half", RopeLayout::half}, {"interleaved", RopeLayout::interleaved}});
  const JsonField frequencies = object.take("inv_freq");
  if (frequencies.size() == 0 || 2 * frequencies.size() > static_cast<std::size_t>(head_dim)) {
    frequencies.fail("1 to head_dim/2 = " + std::to_string(head_dim / 2) + " frequencies");
  }
  rope.inv_freq = reals(frequencies);
  rope.attention_factor = real(object.take("attention_factor"));
  if (object.has("long")) {
    JsonObject inner(object.take("long"));
    const std::int64_t beyond = inner.take("beyond").as_integer(1, 1 << 30);
    const JsonField longer = inner.take("inv_freq");
    if (longer.size() != rope.inv_freq.size())
      longer.fail(std::to_string(rope.inv_freq.size()) + " frequencies");
    rope.long_context = {beyond, reals(longer), real(inner.take("attention_factor"))};
    inner.finish();
  }
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
    a.qk_norm = one_of<QkNorm>(norm, "qk_norm",
                               {{"head", QkNorm::head}, {"row", QkNorm::row}, {"unit", QkNorm::unit}});
  }
  if (const JsonField clip = object.take("clip_qkv"); !clip.is_null()) {
    a.clip_qkv = real(clip);
    if (*a.clip_qkv <= 0) clip.fail("a positive number or null");
  }
  if (const JsonField window = object.take("window"); !window.is_null()) a.window = positive(window, 1 << 30);
  if (object.has("chunk")) a.chunk = positive(object.take("chunk"), 1 << 30);
  a.sinks = flag(object, "sinks");
  a.values_are_keys = flag(object, "values_are_keys");
  a.value_norm = flag(object, "value_norm");
  if (object.has("temperature")) {
    JsonObject temperature(object.take("temperature"));
    a.temperature = {.floor = static_cast<float>(positive(temperature.take("floor"), 1 << 30)),
                     .scale = real(temperature.take("scale"))};
    if (temperature.has("offset"))
      a.temperature->offset = static_cast<float>(temperature.take("offset").as_integer(0, 1));
    temperature.finish();
  }
  if (const JsonField rope = object.take("rope"); !rope.is_null()) a.rope = parse_rope(rope, a.head_dim);
  if (object.has("output_gate"))
    a.output_gate = one_of<bool>(object.take("output_gate"), "gate of attention", {{"sigmoid", true}});
  object.finish();
  return a;
}

namespace {

void parse_activation(JsonObject& object, FfnRecipe& ffn) {
  ffn.activation = one_of<Activation>(object.take("activation"), "activation",
                                      {{"silu", Activation::silu},
                                       {"gelu_tanh", Activation::gelu_tanh},
                                       {"clamped_swiglu", Activation::clamped_swiglu}});
  if (ffn.activation != Activation::clamped_swiglu) return;
  ffn.activation_alpha = real(object.take("activation_alpha"));
  const JsonField limit = object.take("activation_limit");
  ffn.activation_limit = real(limit);
  if (ffn.activation_limit <= 0) limit.fail("a positive number");
}

ExpertGroups parse_groups(const JsonField& field, const FfnRecipe& ffn) {
  JsonObject object(field);
  ExpertGroups groups;
  const JsonField count = object.take("count");
  groups.count = positive(count, ffn.num_experts);
  if (ffn.num_experts % groups.count != 0)
    count.fail("a divisor of num_experts = " + std::to_string(ffn.num_experts));
  const int size = ffn.num_experts / groups.count;
  const JsonField keep = object.take("keep");
  groups.keep = positive(keep, groups.count);
  if (groups.keep * size < ffn.num_experts_per_tok)
    keep.fail("groups that hold num_experts_per_tok = " + std::to_string(ffn.num_experts_per_tok));
  groups.score = one_of<GroupScore>(object.take("score"), "score of a group",
                                    {{"max", GroupScore::max}, {"sum_of_top_2", GroupScore::sum_of_top_2}});
  if (groups.score == GroupScore::sum_of_top_2 && size < 2) count.fail("groups of two experts or more");
  object.finish();
  return groups;
}

RouterRecipe parse_router(const JsonField& field, const FfnRecipe& ffn) {
  JsonObject object(field);
  RouterRecipe router;
  router.scoring = one_of<Scoring>(
      object.take("scoring"), "router scoring",
      {{"softmax", Scoring::softmax}, {"sigmoid", Scoring::sigmoid}, {"sparsemixer", Scoring::sparsemixer}});
  router.bias = one_of<RouterBias>(object, "bias", "bias of a router", RouterBias::none,
                                   {{"logits", RouterBias::logits}, {"selection", RouterBias::selection}});
  if (object.has("groups")) {
    if (const JsonField groups = object.take("groups"); !groups.is_null())
      router.groups = parse_groups(groups, ffn);
  }
  router.normalize = object.take("normalize").as_bool();
  router.norm_epsilon = non_negative(object, "norm_epsilon");
  router.norm_minimum = non_negative(object, "norm_minimum");
  router.scale = real(object.take("scale"));
  router.weighs_input =
      one_of<bool>(object, "weighs", "what a router weighs", false, {{"output", false}, {"input", true}});
  router.expert_scale = flag(object, "expert_scale");
  if (router.scoring == Scoring::sparsemixer) {
    router.jitter = real(object.take("jitter"));
    if (ffn.num_experts_per_tok != 2 || router.chooses_apart() || router.normalize)
      field.fail("for sparsemixer 2 experts a token, and neither selection bias, groups nor normalize");
  }
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
    ffn.expert_bias = flag(object, "expert_bias");
    ffn.branch_norms = flag(object, "branch_norms");
    const JsonField router = object.take("router");
    ffn.router = parse_router(router, ffn);
    if (ffn.expert_bias && ffn.router.weighs_input)
      router.fail("experts without biases where it weighs their input");
    if (const JsonField shared = object.take("shared"); !shared.is_null()) ffn.shared = parse_shared(shared);
  } else {
    unsupported(kind, "ffn", "dense, moe");
  }
  parse_activation(object, ffn);
  object.finish();
  return ffn;
}

BlockRecipe parse_block(const JsonField& field) {
  JsonObject object(field);
  BlockRecipe block;
  block.norm = parse_norm(object, "norm");
  block.post_norms = flag(object, "post_norms");
  block.scaled = flag(object, "scaled");
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
  recipe.output_bias = flag(output, "bias");
  recipe.output_softcap = non_negative(output, "softcap");
  output.finish();
  recipe.final_norm = parse_norm(root, "final_norm");
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
