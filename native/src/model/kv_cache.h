// KV blocks of 16 tokens behind block tables, drawn from one pool that the budget has paid for.
//
// A block holds the 16 tokens of every layer; where a layer and head lie inside it is fixed per model.
// Threads: the pool is thread-safe, a sequence is not; block contents are written by the step.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels/kernels.h"
#include "model/recipe.h"
#include "platform/memory.h"

namespace edgert {

struct KvLayout {
  KvLayout(const Recipe& recipe, KvType type);
  std::size_t key_offset(int layer, int head) const;
  std::size_t value_offset(int layer, int head) const;

  KvType type;
  std::size_t block_bytes = 0;

 private:
  struct Layer {
    std::size_t offset, key_bytes, head_bytes;
  };
  std::vector<Layer> layers_;
};

class KvPool {
 public:
  KvPool(KvLayout layout, std::int64_t blocks, std::shared_ptr<Budget> budget);
  static std::uint64_t bytes(const KvLayout& layout, std::int64_t blocks) {
    return layout.block_bytes * static_cast<std::uint64_t>(blocks);
  }
  const KvLayout& layout() const noexcept { return layout_; }

 private:
  friend class KvSequence;
  KvLayout layout_;
  Buffer memory_;
  std::mutex mutex_;  // of free_
  std::vector<std::byte*> free_;
};

// One sequence's state: how many tokens are in, and the blocks that hold them.
class KvSequence {
 public:
  KvSequence(std::shared_ptr<KvPool> pool, std::int64_t context);
  ~KvSequence();
  KvSequence(const KvSequence&) = delete;
  KvSequence& operator=(const KvSequence&) = delete;

  std::int64_t length() const noexcept { return length_; }
  std::int64_t context() const noexcept { return context_; }
  const std::byte* const* blocks() const noexcept { return blocks_.data(); }
  std::byte* block(std::int64_t position) const {
    return blocks_[static_cast<std::size_t>(position / kKvBlockTokens)];
  }

  // Makes room for `tokens` in total. Error{invalid_argument} past the context, Error{budget} where the pool
  // is dry.
  void reserve(std::int64_t tokens);
  void advance(std::int64_t tokens) { length_ += tokens; }  // REQUIRES reserve(length() + tokens)
  void rewind(std::int64_t length);  // Error{invalid_argument} unless 0 <= length <= length()

 private:
  std::shared_ptr<KvPool> pool_;
  const std::int64_t context_;
  std::int64_t length_ = 0;
  std::vector<std::byte*> blocks_;
};

}  // namespace edgert
