// KV blocks of 16 tokens behind block tables, drawn from one pool that the budget has paid for.
//
// A block holds the 16 tokens of every layer that attends; where a layer and head lie inside it is fixed per
// model. What other layers keep of a sequence is in sequence_state.h; the pool has a slot of it for each of
// as many sequences as it was made for. Threads: the pool is thread-safe. A sequence has one user at a time,
// who holds it; rewind() and length() may be called from any thread. Block contents are written by the step.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "adapters/overlay.h"
#include "kernels/kernels.h"
#include "model/recipe.h"
#include "model/sequence_state.h"
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
    std::size_t offset = 0, key_bytes = 0, head_bytes = 0;
  };
  void add(std::size_t heads, int key_dim, int value_dim);
  std::vector<Layer> layers_;
};

class KvPool {
 public:
  struct Shape {
    std::int64_t context = 0;  // tokens of a sequence
    int sequences = 0;         // of that length, at a time
    std::int64_t blocks() const noexcept {
      return (context + kKvBlockTokens - 1) / kKvBlockTokens * sequences;
    }
  };
  KvPool(const Recipe& recipe, KvType type, const Shape& shape, std::shared_ptr<Budget> budget);
  // kUnaddressable at most
  static std::uint64_t kv_bytes(const KvLayout& layout, const Shape& shape);
  static std::uint64_t state_bytes(const StateLayout& layout, const Shape& shape);
  const KvLayout& layout() const noexcept { return layout_; }
  const StateLayout& state_layout() const noexcept { return state_layout_; }

 private:
  friend class KvSequence;
  KvLayout layout_;
  StateLayout state_layout_;
  Shape shape_;
  Buffer memory_;
  Buffer states_;
  std::mutex mutex_;  // of what is free
  std::vector<std::byte*> free_;
  std::vector<std::byte*> free_slots_;
};

// One sequence's state: how many tokens are in, and the blocks that hold them.
class KvSequence {
 public:
  // `mix`: the adapters that its tokens are computed with; null for none.
  explicit KvSequence(std::shared_ptr<KvPool> pool, std::shared_ptr<const AdapterMix> mix = nullptr);
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

  const AdapterMix* mix() const noexcept { return mix_.get(); }
  std::int64_t length() const noexcept { return length_; }
  bool belongs_to(const KvPool& pool) const noexcept { return pool_.get() == &pool; }
  const std::byte* const* blocks() const noexcept { return blocks_.data(); }
  std::byte* block(std::int64_t position) const {
    return blocks_[static_cast<std::size_t>(position / kKvBlockTokens)];
  }

  // For the holder. Makes room for `tokens` in total. Error{invalid_argument} past the context, Error{budget}
  // where the pool is dry.
  void reserve(std::int64_t tokens);
  // Tokens that need not run again; the others of length() do, before any new one (see sequence_state.h).
  std::int64_t computed() const noexcept { return computed_; }
  // A token that is in, or room for one that is to come; null where none has to be kept. REQUIRES reserve().
  std::int32_t* token(std::int64_t position) const;
  // State of fixed size of layers that have some. REQUIRES reserve().
  const SequenceState& state() const noexcept { return state_; }
  void advance() noexcept;  // by a token. REQUIRES reserve(computed() + 1)
  void settle() noexcept;   // once a step is done
  // Back to the `length` tokens that there were before a step.
  void restore(std::int64_t length) noexcept { truncate(length); }

  // For others. Error{invalid_argument} unless 0 <= length <= length(), and while a step runs on it.
  void rewind(std::int64_t length);

 private:
  void truncate(std::int64_t length) noexcept;

  std::shared_ptr<KvPool> pool_;
  const std::shared_ptr<const AdapterMix> mix_;
  std::atomic<bool> held_{false};
  std::atomic<std::int64_t> length_{0};
  std::int64_t computed_ = 0;
  SequenceState state_;
  std::vector<std::byte*> blocks_;
};

}  // namespace edgert
