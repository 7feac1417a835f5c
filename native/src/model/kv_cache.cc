#include "model/kv_cache.h"

#include <algorithm>

#include "platform/error.h"

namespace edgert {

KvLayout::KvLayout(const Recipe& recipe, KvType kv_type) : type(kv_type) {
  for (int i = 0; i < recipe.num_layers(); ++i) {
    const MixerRecipe& mixer = recipe.block(i).mixer;
    if (const auto* a = std::get_if<AttentionRecipe>(&mixer)) {
      add(static_cast<std::size_t>(a->num_kv_heads), a->head_dim, a->head_dim);
    } else if (const auto* latent = std::get_if<LatentAttentionRecipe>(&mixer)) {
      add(1, latent->key_dim(), latent->kv_rank);
    } else {
      layers_.emplace_back();
    }
  }
}

void KvLayout::add(std::size_t heads, int key_dim, int value_dim) {
  const std::size_t key_bytes = kv_key_bytes(type, key_dim);
  const std::size_t head_bytes = key_bytes + kv_value_bytes(type, value_dim);
  layers_.push_back({block_bytes, key_bytes, head_bytes});
  block_bytes += head_bytes * heads;
}

std::size_t KvLayout::key_offset(int layer, int head) const {
  const Layer& l = layers_[static_cast<std::size_t>(layer)];
  return l.offset + l.head_bytes * static_cast<std::size_t>(head);
}

std::size_t KvLayout::value_offset(int layer, int head) const {
  return key_offset(layer, head) + layers_[static_cast<std::size_t>(layer)].key_bytes;
}

namespace {

std::uint64_t product(std::uint64_t a, std::uint64_t b) {
  std::uint64_t bytes = 0;
  return __builtin_mul_overflow(a, b, &bytes) ? kUnaddressable : std::min(bytes, kUnaddressable);
}

std::vector<std::byte*> pieces(std::byte* base, std::size_t bytes, std::int64_t count) {
  std::vector<std::byte*> all;
  for (std::int64_t i = count; i-- > 0;) all.push_back(base + bytes * static_cast<std::size_t>(i));
  return all;
}

}  // namespace

std::uint64_t KvPool::kv_bytes(const KvLayout& layout, const Shape& shape) {
  return product(layout.block_bytes, static_cast<std::uint64_t>(shape.blocks()));
}

std::uint64_t KvPool::state_bytes(const StateLayout& layout, const Shape& shape) {
  return product(layout.slot_bytes(shape.context), static_cast<std::uint64_t>(shape.sequences));
}

KvPool::KvPool(const Recipe& recipe, KvType type, const Shape& shape, std::shared_ptr<Budget> budget)
    : layout_(recipe, type), state_layout_(recipe), shape_(shape) {
  if (const std::uint64_t bytes = kv_bytes(layout_, shape); bytes != 0)
    memory_ = Buffer(budget, bytes, "KV cache");
  free_ = pieces(memory_.data(), layout_.block_bytes, shape.blocks());
  if (state_layout_.floats == 0) return;
  states_ = Buffer(std::move(budget), state_bytes(state_layout_, shape), "sequence state");
  free_slots_ = pieces(states_.data(), state_layout_.slot_bytes(shape.context), shape.sequences);
}

KvSequence::KvSequence(std::shared_ptr<KvPool> pool, std::shared_ptr<const AdapterMix> mix)
    : pool_(std::move(pool)), mix_(std::move(mix)), state_(pool_->state_layout_.floats) {}

KvSequence::~KvSequence() { truncate(0); }

void KvSequence::reserve(std::int64_t tokens) {
  const std::int64_t context = pool_->shape_.context;
  if (tokens > context) {
    throw Error(ErrorKind::invalid_argument, "the sequence would hold " + std::to_string(tokens) +
                                                 " tokens, the context is " + std::to_string(context) +
                                                 "; shorten it or load the model with a larger context");
  }
  const auto needed = static_cast<std::size_t>((tokens + kKvBlockTokens - 1) / kKvBlockTokens);
  const std::lock_guard lock(pool_->mutex_);
  if (needed > blocks_.size() && needed - blocks_.size() > pool_->free_.size()) {
    throw Error(ErrorKind::budget,
                "the KV cache is full: " + std::to_string(needed - blocks_.size()) + " more blocks of " +
                    std::to_string(kKvBlockTokens) + " tokens are needed, " +
                    std::to_string(pool_->free_.size()) +
                    " are free; close a sequence or load the model with a larger `parallel`");
  }
  if (pool_->state_layout_.floats != 0 && !state_.has_slot()) {
    if (pool_->free_slots_.empty()) {
      throw Error(
          ErrorKind::budget,
          "all " + std::to_string(pool_->shape_.sequences) +
              " sequences that memory was set aside for have tokens in them; close a sequence or load "
              "the model with a larger `parallel`");
    }
    state_.take(pool_->free_slots_.back());
    pool_->free_slots_.pop_back();
  }
  state_.begin();
  while (blocks_.size() < needed) {
    blocks_.push_back(pool_->free_.back());
    pool_->free_.pop_back();
  }
}

std::int32_t* KvSequence::token(std::int64_t position) const {
  return state_.has_slot() ? &state_.token(position) : nullptr;
}

void KvSequence::advance() noexcept {
  ++computed_;
  if (computed_ > length_) length_ = computed_;
}

void KvSequence::settle() noexcept {
  if (state_.has_slot()) state_.settle(computed_);
}

void KvSequence::rewind(std::int64_t length) {
  const Hold hold(*this);
  if (!hold) {
    throw Error(ErrorKind::invalid_argument,
                "the sequence is in a step that runs: rewind or close it afterwards, or cancel the step");
  }
  if (length < 0 || length > length_) {
    throw Error(ErrorKind::invalid_argument,
                "rewind to " + std::to_string(length) + ", allowed 0 to " + std::to_string(length_));
  }
  state_.rewind(length);
  truncate(length);
}

void KvSequence::truncate(std::int64_t length) noexcept {
  length_ = length;
  computed_ = state_.has_slot() ? state_.length() : length;
  const auto needed = static_cast<std::size_t>((length + kKvBlockTokens - 1) / kKvBlockTokens);
  const std::lock_guard lock(pool_->mutex_);
  while (blocks_.size() > needed) {
    pool_->free_.push_back(blocks_.back());
    blocks_.pop_back();
  }
  if (length == 0 && state_.has_slot()) pool_->free_slots_.push_back(state_.give());
}

}  // namespace edgert
