// KV blocks of 16 tokens behind block tables, drawn from one pool that the budget has paid for.
//
// A block holds the 16 tokens of every layer; where a layer and head lie inside it is fixed per model.
// Threads: the pool is thread-safe. A sequence has one user at a time, who holds it; rewind() and length()
// may be called from any thread. Block contents are written by the step.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
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
  static std::uint64_t bytes(const KvLayout& layout, std::int64_t blocks);  // kUnaddressable at most
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

  // Keeps other users out while it lives; empty where there is one.
  class Hold {
   public:
    explicit Hold(KvSequence& sequence) : sequence_(sequence.held_.exchange(true) ? nullptr : &sequence) {}
    ~Hold() {
      if (sequence_ != nullptr) sequence_->held_ = false;
    }
    Hold(Hold&& other) noexcept : sequence_(std::exchange(other.sequence_, nullptr)) {}
    Hold& operator=(Hold&&) = delete;
    explicit operator bool() const noexcept { return sequence_ != nullptr; }

   private:
    KvSequence* sequence_;
  };

  std::int64_t length() const noexcept { return length_; }
  bool belongs_to(const KvPool& pool) const noexcept { return pool_.get() == &pool; }
  const std::byte* const* blocks() const noexcept { return blocks_.data(); }
  std::byte* block(std::int64_t position) const {
    return blocks_[static_cast<std::size_t>(position / kKvBlockTokens)];
  }

  // For the holder. Makes room for `tokens` in total. Error{invalid_argument} past the context, Error{budget}
  // where the pool is dry.
  void reserve(std::int64_t tokens);
  void advance(std::int64_t tokens) { length_ += tokens; }  // REQUIRES reserve(length() + tokens)
  // Back to `length` tokens, without the room reserved for more. REQUIRES 0 <= length <= length().
  void truncate(std::int64_t length) noexcept;

  // For others. Error{invalid_argument} unless 0 <= length <= length(), and while a step runs on it.
  void rewind(std::int64_t length);

 private:
  std::shared_ptr<KvPool> pool_;
  const std::int64_t context_;
  std::atomic<bool> held_{false};
  std::atomic<std::int64_t> length_{0};
  std::vector<std::byte*> blocks_;
};

}  // namespace edgert
