#include "model/sequence_state.h"

#include <utility>

#include "kernels/kernels.h"
#include "platform/memory.h"

namespace edgert {
namespace {

constexpr std::size_t kLine = 64;

std::size_t lines(std::size_t floats) { return round_up(floats, kLine / sizeof(float)); }

std::size_t history_floats(int width, int channels) {
  return lines(static_cast<std::size_t>(width - 1) * static_cast<std::size_t>(channels));
}

}  // namespace

StateLayout::StateLayout(const Recipe& recipe) {
  for (int i = 0; i < recipe.num_layers(); ++i) {
    Layer& layer = layers.emplace_back();
    layer.history = floats;
    const MixerRecipe& mixer = recipe.block(i).mixer;
    if (const auto* conv = std::get_if<ShortConvRecipe>(&mixer)) {
      floats += history_floats(conv->conv_kernel, recipe.hidden_size);
    } else if (const auto* delta = std::get_if<GatedDeltaRecipe>(&mixer)) {
      floats += history_floats(delta->conv_kernel, delta->channels());
      layer.recurrence = floats;
      floats += lines(static_cast<std::size_t>(delta->num_value_heads) *
                      delta_state_floats(delta->key_head_dim, delta->value_head_dim));
    }
  }
}

void SequenceState::take(std::byte* slot) noexcept {
  slot_ = slot;
  length_ = 0;
  older_ = -1;
}

std::byte* SequenceState::give() noexcept {
  length_ = 0;
  return std::exchange(slot_, nullptr);
}

float* SequenceState::copy(int index) const noexcept {
  return reinterpret_cast<float*>(slot_) + static_cast<std::size_t>(index) * floats_;
}

const float* SequenceState::before(std::int64_t position) const noexcept {
  if (position == 0) return nullptr;
  return position == length_ ? copy(kept_) : copy(1 - kept_);
}

void SequenceState::settle(std::int64_t length) noexcept {
  older_ = length_;
  length_ = length;
  kept_ = 1 - kept_;
}

void SequenceState::restore(std::int64_t length) noexcept {
  length_ = length;
  older_ = -1;
}

void SequenceState::rewind(std::int64_t length) noexcept {
  if (length >= length_) return;
  if (older_ >= 0 && older_ <= length) {
    kept_ = 1 - kept_;
    length_ = std::exchange(older_, -1);
  } else {
    length_ = 0;
    older_ = -1;
  }
}

}  // namespace edgert
