// What the parts of the recipe's parser share.
#pragma once

#include <string>

#include "model/recipe.h"

namespace edgert {

inline constexpr std::int64_t kMaxDimension = 1 << 24;

[[noreturn]] void unsupported(const JsonField& field, const std::string& what, const std::string& known);
int positive(const JsonField& field, std::int64_t maximum = kMaxDimension);
float real(const JsonField& field);
bool flag(JsonObject& object, std::string_view key);  // false where the key is absent

RopeRecipe parse_rope(const JsonField& field, int head_dim);
AttentionRecipe parse_attention(JsonObject object);
MixerRecipe parse_mixer(const JsonField& field);

}  // namespace edgert
