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
  const std::uint64_t bytes = product(layout.block_bytes, static_cast<std::uint64_t>(shape.blocks()));
  return std::min(bytes + round_up(KvBlocks::table_bytes(shape.blocks()), page_size()), kUnaddressable);
}

std::uint64_t KvPool::state_bytes(const StateLayout& layout, const Shape& shape) {
  return product(layout.slot_bytes(), static_cast<std::uint64_t>(shape.sequences));
}

KvPool::KvPool(const Recipe& recipe, KvType type, const Shape& shape, std::shared_ptr<Budget> budget)
    : layout_(recipe, type), state_layout_(recipe), shape_(shape), blocks_(shape.blocks(), budget) {
  if (const std::uint64_t bytes = product(layout_.block_bytes, static_cast<std::uint64_t>(shape.blocks()));
      bytes != 0)
    memory_ = Buffer(budget, bytes, "KV cache");
  if (state_layout_.floats == 0) return;
  states_ = Buffer(std::move(budget), state_bytes(state_layout_, shape), "sequence state");
  free_slots_ = pieces(states_.data(), state_layout_.slot_bytes(), shape.sequences);
}

void KvPool::share(bool on) noexcept {
  if (shares_.exchange(on) != on) blocks_.forget();
}

KvSequence::KvSequence(std::shared_ptr<KvPool> pool, std::shared_ptr<const AdapterMix> mix,
                       std::uint64_t root)
    : pool_(std::move(pool)),
      mix_(std::move(mix)),
      root_(root),
      shares_(pool_->shares()),
      epoch_(pool_->blocks_.epoch()),
      state_(pool_->state_layout_.floats) {}

KvSequence::~KvSequence() { truncate(0); }

std::byte* KvSequence::data(KvBlocks::Index block) const noexcept {
  return pool_->memory_.data() + pool_->layout_.block_bytes * static_cast<std::size_t>(block);
}

void KvSequence::add(KvBlocks::Index block) {
  indices_.push_back(block);
  blocks_.push_back(data(block));
}

std::int64_t KvSequence::begin_with(std::span<const std::int32_t> prompt) {
  if (!shares_ || prompt.empty()) return 0;
  const std::size_t whole = (prompt.size() - 1) / kKvBlockTokens;
  indices_.reserve(whole);
  blocks_.reserve(whole);
  KvBlocks::Index parent = KvBlocks::kNone;
  while (published_ < whole) {
    parent = pool_->blocks_.find(root_, parent, prompt.subspan(published_ * kKvBlockTokens, kKvBlockTokens));
    if (parent == KvBlocks::kNone) break;
    add(parent);
    ++published_;
  }
  computed_ = static_cast<std::int64_t>(published_) * kKvBlockTokens;
  length_ = computed_;
  return computed_;
}

void KvSequence::reserve(std::int64_t tokens) {
  if (try_reserve(tokens)) return;
  if (pool_->state_layout_.floats != 0 && !state_.has_slot()) {
    throw Error(ErrorKind::budget,
                "all " + std::to_string(pool_->shape_.sequences) +
                    " sequences that memory was set aside for have tokens in them; close a sequence or load "
                    "the model with a larger `parallel`");
  }
  const std::int64_t needed = (tokens + kKvBlockTokens - 1) / kKvBlockTokens - num_blocks();
  const KvBlocks::Counts there = pool_->blocks();
  throw Error(ErrorKind::budget,
              "the KV cache is full: " + std::to_string(std::max<std::int64_t>(needed, 1)) +
                  " more blocks of " + std::to_string(kKvBlockTokens) + " tokens are needed, " +
                  std::to_string(there.free + there.idle) +
                  " are free; close a sequence or load the model with a larger `parallel`");
}

bool KvSequence::try_reserve(std::int64_t tokens) {
  const std::int64_t context = pool_->shape_.context;
  if (tokens > context) {
    throw Error(ErrorKind::invalid_argument, "the sequence would hold " + std::to_string(tokens) +
                                                 " tokens, the context is " + std::to_string(context) +
                                                 "; shorten it or load the model with a larger context");
  }
  if (!take_slot() || (tokens > computed_ && !own_last())) return false;
  const auto needed = static_cast<std::size_t>((tokens + kKvBlockTokens - 1) / kKvBlockTokens);
  if (needed > indices_.size()) {
    std::vector<KvBlocks::Index> more(needed - indices_.size());
    indices_.reserve(needed);
    blocks_.reserve(needed);
    if (!pool_->blocks_.take(more.size(), more)) return false;
    for (const KvBlocks::Index block : more) {
      add(block);
      // One that is saved half full is to hold nothing of others.
      if (pool_->state_layout_.floats != 0)
        std::fill_n(blocks_.back(), pool_->layout_.block_bytes, std::byte{0});
    }
  }
  state_.begin();
  return true;
}

bool KvSequence::take_slot() {
  if (pool_->state_layout_.floats == 0 || state_.has_slot()) return true;
  const std::lock_guard lock(pool_->mutex_);
  if (pool_->free_slots_.empty()) return false;
  state_.take(pool_->free_slots_.back());
  pool_->free_slots_.pop_back();
  return true;
}

// The block that the next token goes to must be nobody else's.
bool KvSequence::own_last() {
  const auto last = static_cast<std::size_t>(computed_ / kKvBlockTokens);
  if (last >= published_) return true;
  const KvBlocks::Index block = pool_->blocks_.own(indices_[last]);
  if (block == KvBlocks::kNone) return false;
  if (block != indices_[last]) std::copy_n(blocks_[last], pool_->layout_.block_bytes, data(block));
  indices_[last] = block;
  blocks_[last] = data(block);
  published_ = last;
  return true;
}

std::int32_t& KvSequence::token(std::int64_t position) const {
  const KvBlocks::Index block = indices_[static_cast<std::size_t>(position / kKvBlockTokens)];
  return pool_->blocks_.tokens(block)[static_cast<std::size_t>(position % kKvBlockTokens)];
}

void KvSequence::advance() noexcept {
  ++computed_;
  if (computed_ > length_) length_ = computed_;
}

void KvSequence::settle() noexcept {
  if (state_.has_slot()) state_.settle(computed_);
  if (!shares_) return;
  for (; published_ < static_cast<std::size_t>(computed_ / kKvBlockTokens); ++published_) {
    const KvBlocks::Index parent = published_ == 0 ? KvBlocks::kNone : indices_[published_ - 1];
    const KvBlocks::Index block = pool_->blocks_.publish(root_, parent, indices_[published_], epoch_);
    if (block == KvBlocks::kNone) return;
    indices_[published_] = block;
    blocks_[published_] = data(block);
  }
}

std::int64_t KvSequence::saved_length() const noexcept {
  return pool_->state_layout_.floats != 0 ? computed_ : computed_ / kKvBlockTokens * kKvBlockTokens;
}

std::span<std::byte> KvSequence::saved_block(std::int64_t index) const noexcept {
  return {blocks_[static_cast<std::size_t>(index)], pool_->layout_.block_bytes};
}

std::span<std::byte> KvSequence::saved_state() const noexcept {
  if (!state_.has_slot()) return {};
  return std::as_writable_bytes(std::span(state_.kept(), pool_->state_layout_.floats));
}

void KvSequence::begin_restore(std::span<const std::int32_t> tokens) {
  shares_ = false;
  reserve(static_cast<std::int64_t>(tokens.size()));
  for (std::size_t at = 0; at < tokens.size(); ++at) token(static_cast<std::int64_t>(at)) = tokens[at];
}

void KvSequence::end_restore(std::int64_t length) noexcept {
  if (state_.has_slot()) state_.restore(length);
  computed_ = length;
  length_ = length;
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
  while (indices_.size() > needed) {
    pool_->blocks_.release(indices_.back());
    indices_.pop_back();
    blocks_.pop_back();
  }
  published_ = std::min(published_, needed);
  if (length != 0 || !state_.has_slot()) return;
  const std::lock_guard lock(pool_->mutex_);
  pool_->free_slots_.push_back(state_.give());
}

}  // namespace edgert
