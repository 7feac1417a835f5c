// The kinds of sequence mixing beside attention, as the recipe states them.
#include "kernels/kernels.h"
#include "model/recipe_parse.h"

namespace edgert {

namespace {

constexpr std::int64_t kMaxHeads = 1 << 12;
constexpr std::int64_t kMaxHeadDim = 512;
constexpr std::int64_t kMaxLatent = 4096;

// Heads' slabs of a packed matrix begin with a tile.
int whole_tiles(const JsonField& field, std::int64_t maximum) {
  const int rows = positive(field, maximum);
  if (rows % kTileRows != 0) field.fail("a multiple of " + std::to_string(kTileRows));
  return rows;
}

LatentAttentionRecipe parse_latent_attention(JsonObject object) {
  LatentAttentionRecipe a;
  a.num_heads = positive(object.take("num_heads"), kMaxHeads);
  if (const JsonField rank = object.take("q_rank"); !rank.is_null()) a.q_rank = positive(rank);
  a.kv_rank = whole_tiles(object.take("kv_rank"), kMaxLatent);
  a.nope_head_dim = positive(object.take("nope_head_dim"), kMaxHeadDim);
  a.rope_head_dim = positive(object.take("rope_head_dim"), kMaxHeadDim);
  a.value_head_dim = whole_tiles(object.take("value_head_dim"), kMaxHeadDim);
  a.scale = real(object.take("scale"));
  a.norm_eps = real(object.take("norm_eps"));
  a.rope = parse_rope(object.take("rope"), a.rope_head_dim);
  a.qkv_bias = flag(object, "qkv_bias");
  a.output_bias = flag(object, "output_bias");
  object.finish();
  return a;
}

int conv_kernel(JsonObject& object) {
  return static_cast<int>(object.take("conv_kernel").as_integer(2, kMaxConvolution));
}

GatedDeltaRecipe parse_gated_delta(JsonObject object) {
  GatedDeltaRecipe d;
  d.num_key_heads = positive(object.take("num_key_heads"), kMaxHeads);
  const JsonField value_heads = object.take("num_value_heads");
  d.num_value_heads = positive(value_heads, kMaxHeads);
  if (d.num_value_heads % d.num_key_heads != 0)
    value_heads.fail("a multiple of num_key_heads = " + std::to_string(d.num_key_heads));
  d.key_head_dim = positive(object.take("key_head_dim"), kMaxHeadDim);
  d.value_head_dim = positive(object.take("value_head_dim"), kMaxHeadDim);
  d.conv_kernel = conv_kernel(object);
  d.norm_eps = real(object.take("norm_eps"));
  d.tiled = flag(object, "tiled");
  object.finish();
  return d;
}

ShortConvRecipe parse_short_conv(JsonObject object) {
  ShortConvRecipe c;
  c.conv_kernel = conv_kernel(object);
  c.bias = flag(object, "bias");
  object.finish();
  return c;
}

}  // namespace

MixerRecipe parse_mixer(const JsonField& field) {
  JsonObject object(field);
  const JsonField kind = object.take("kind");
  const std::string& name = kind.as_string();
  if (name == "attention") return parse_attention(std::move(object));
  if (name == "latent_attention") return parse_latent_attention(std::move(object));
  if (name == "gated_delta") return parse_gated_delta(std::move(object));
  if (name == "short_conv") return parse_short_conv(std::move(object));
  unsupported(kind, "sequence mixing", "attention, latent_attention, gated_delta, short_conv");
}

}  // namespace edgert
