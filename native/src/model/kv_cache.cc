#include "model/kv_cache.h"

#include <algorithm>

#include "platform/error.h"

namespace edgert {

KvLayout::KvLayout(const Recipe& recipe, KvType kv_type) : type(kv_type) {
  for (int i = 0; i < recipe.num_layers(); ++i) {
    const AttentionRecipe& a = recipe.block(i).attention;
    const std::size_t key_bytes = kv_key_bytes(kv_type, a.head_dim);
    const std::size_t value_bytes = kv_value_bytes(kv_type, a.head_dim);
    layers_.push_back({block_bytes, key_bytes, key_bytes + value_bytes});
    block_bytes += (key_bytes + value_bytes) * static_cast<std::size_t>(a.num_kv_heads);
  }
}

std::size_t KvLayout::key_offset(int layer, int head) const {
  const Layer& l = layers_[static_cast<std::size_t>(layer)];
  return l.offset + l.head_bytes * static_cast<std::size_t>(head);
}

std::size_t KvLayout::value_offset(int layer, int head) const {
  return key_offset(layer, head) + layers_[static_cast<std::size_t>(layer)].key_bytes;
}

std::uint64_t KvPool::bytes(const KvLayout& layout, std::int64_t blocks) {
  std::uint64_t bytes = 0;
  const bool overflow =
      __builtin_mul_overflow(std::uint64_t{layout.block_bytes}, static_cast<std::uint64_t>(blocks), &bytes);
  return overflow ? kUnaddressable : std::min(bytes, kUnaddressable);
}

KvPool::KvPool(KvLayout layout, std::int64_t blocks, std::shared_ptr<Budget> budget)
    : layout_(std::move(layout)), memory_(std::move(budget), bytes(layout_, blocks), "KV cache") {
  for (std::int64_t i = blocks; i-- > 0;) {
    free_.push_back(memory_.data() + layout_.block_bytes * static_cast<std::size_t>(i));
  }
}

KvSequence::KvSequence(std::shared_ptr<KvPool> pool, std::int64_t context)
    : pool_(std::move(pool)), context_(context) {}

KvSequence::~KvSequence() { truncate(0); }

void KvSequence::reserve(std::int64_t tokens) {
  if (tokens > context_) {
    throw Error(ErrorKind::invalid_argument, "the sequence would hold " + std::to_string(tokens) +
                                                 " tokens, the context is " + std::to_string(context_) +
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
  while (blocks_.size() < needed) {
    blocks_.push_back(pool_->free_.back());
    pool_->free_.pop_back();
  }
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
  truncate(length);
}

void KvSequence::truncate(std::int64_t length) noexcept {
  length_ = length;
  const auto needed = static_cast<std::size_t>((length + kKvBlockTokens - 1) / kKvBlockTokens);
  const std::lock_guard lock(pool_->mutex_);
  while (blocks_.size() > needed) {
    pool_->free_.push_back(blocks_.back());
    blocks_.pop_back();
  }
}

}  // namespace edgert
