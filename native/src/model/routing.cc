#include "model/routing.h"

#include <algorithm>
#include <string>

#include "platform/error.h"

namespace edgert {
namespace {

[[noreturn]] void refuse(const std::string& where, std::int64_t found, std::int64_t allowed,
                         const char* what) {
  throw Error(ErrorKind::invalid_argument, "routing: " + where + ": found " + std::to_string(found) +
                                               ", this model needs " + std::to_string(allowed) + what);
}

// Sorted, after checking that they are what `ffn` chooses.
std::vector<std::int32_t> checked(std::vector<std::int32_t> ids, const FfnRecipe& ffn,
                                  const std::string& where) {
  if (static_cast<std::int64_t>(ids.size()) != ffn.num_experts_per_tok)
    refuse(where, static_cast<std::int64_t>(ids.size()), ffn.num_experts_per_tok, " experts");
  std::sort(ids.begin(), ids.end());
  if (ids.front() < 0 || ids.back() >= ffn.num_experts) {
    const std::int32_t id = ids.front() < 0 ? ids.front() : ids.back();
    throw Error(ErrorKind::invalid_argument, "routing: " + where + ": expert " + std::to_string(id) +
                                                 ", allowed 0 to " + std::to_string(ffn.num_experts - 1));
  }
  const auto twice = std::adjacent_find(ids.begin(), ids.end());
  if (twice != ids.end()) {
    throw Error(ErrorKind::invalid_argument,
                "routing: " + where + ": expert " + std::to_string(*twice) + " stands twice");
  }
  return ids;
}

}  // namespace

ImposedRouting::ImposedRouting(const Recipe& recipe, const Table& table)
    : rows_(recipe.layers.size()), positions_(table.size()) {
  std::vector<const FfnRecipe*> moe;
  for (int layer = 0; layer < recipe.num_layers(); ++layer) {
    const FfnRecipe& ffn = recipe.block(layer).ffn;
    if (!ffn.is_moe()) continue;
    moe.push_back(&ffn);
    const auto count = static_cast<std::size_t>(ffn.num_experts_per_tok);
    rows_[static_cast<std::size_t>(layer)] = {per_position_, count};
    per_position_ += count;
  }
  if (table.empty()) throw Error(ErrorKind::invalid_argument, "routing: found no position");
  experts_.reserve(positions_ * per_position_);
  for (std::size_t position = 0; position < positions_; ++position) {
    const std::string where = "position " + std::to_string(position);
    const auto& layers = table[position];
    if (layers.size() != moe.size())
      refuse(where, static_cast<std::int64_t>(layers.size()), static_cast<std::int64_t>(moe.size()),
             " MoE layers");
    for (std::size_t i = 0; i < layers.size(); ++i) {
      const auto ids = checked(layers[i], *moe[i], where + ", MoE layer " + std::to_string(i));
      experts_.insert(experts_.end(), ids.begin(), ids.end());
    }
  }
}

std::span<const std::int32_t> ImposedRouting::experts(int layer, std::int64_t position) const noexcept {
  const Row& row = rows_[static_cast<std::size_t>(layer)];
  const std::size_t at = static_cast<std::size_t>(position) % positions_;
  return std::span(experts_).subspan(at * per_position_ + row.first, row.count);
}

}  // namespace edgert
