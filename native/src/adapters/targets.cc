#include "adapters/targets.h"

#include <algorithm>
#include <charconv>

#include "platform/error.h"

namespace edgert {
namespace {

// Takes `word` off the front; false where it does not stand there.
bool take(std::string_view& text, std::string_view word) {
  if (!text.starts_with(word)) return false;
  text.remove_prefix(word.size());
  return true;
}

bool take(std::string_view& text, int& number) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || number < 0) return false;
  text.remove_prefix(static_cast<std::size_t>(end - text.data()));
  return true;
}

}  // namespace

int Targets::add(const std::string& name, Shape shape) {
  const auto [place, added] = dense_.emplace(name, count_);
  if (added) {
    shapes_.push_back(shape);
    ++count_;
  }
  return place->second;
}

void Targets::add_experts(int layer, int experts, std::size_t hidden_size, std::size_t intermediate_size) {
  layers_.resize(static_cast<std::size_t>(layer) + 1, {count_, 0, {}, {}});
  layers_.back() = {count_, experts, {intermediate_size, hidden_size}, {hidden_size, intermediate_size}};
  count_ += 3 * experts;
}

int Targets::find(std::string_view name) const {
  if (const auto place = dense_.find(name); place != dense_.end()) return place->second;
  const int target = find_expert(name);
  if (target < 0) {
    throw Error(ErrorKind::invalid_argument,
                "adapter: this model has no matrix '" + std::string(name.substr(0, 120)) +
                    "' that an adapter can change; matrices are named as in its manifest");
  }
  return target;
}

int Targets::find_expert(std::string_view name) const {
  int layer = 0;
  int expert = 0;
  if (!take(name, "layers.") || !take(name, layer) || !take(name, ".experts.") || !take(name, expert))
    return -1;
  if (static_cast<std::size_t>(layer) >= layers_.size()) return -1;
  if (expert >= layers_[static_cast<std::size_t>(layer)].experts) return -1;
  if (name == ".gate") return this->expert(layer, expert, ExpertPart::gate);
  if (name == ".up") return this->expert(layer, expert, ExpertPart::up);
  if (name == ".down") return this->expert(layer, expert, ExpertPart::down);
  return -1;
}

Targets::Shape Targets::shape(int target) const noexcept {
  if (static_cast<std::size_t>(target) < shapes_.size()) return shapes_[static_cast<std::size_t>(target)];
  const auto after = std::upper_bound(layers_.begin(), layers_.end(), target,
                                      [](int number, const Layer& layer) { return number < layer.first; });
  if (after == layers_.begin()) return {};
  const Layer& layer = *(after - 1);  // those without experts stand before the next that has some
  const int part = target - layer.first;
  if (part >= 3 * layer.experts) return {};
  return part % 3 == static_cast<int>(ExpertPart::down) ? layer.down : layer.gate;
}

}  // namespace edgert
