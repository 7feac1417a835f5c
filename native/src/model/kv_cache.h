// KV blocks of 16 tokens behind block tables, drawn from one pool that the budget has paid for.
//
// A block holds the 16 tokens of every layer that attends; where a layer and head lie inside it is fixed per
// model. What other layers keep of a sequence is in sequence_state.h; the pool has a slot of it for each of
// as many sequences as it was made for.
//
// Sequences that begin alike share blocks, and begin with those that the pool remembers (kv_blocks.h). Keys
// and values of a token depend on the tokens up to it and on the adapters alone, so that windows and latent
// attention share as well. State of fixed size has forgotten what it was at an earlier token: models with
// such state share nothing.
//
// Threads: the pool is thread-safe. A sequence has one user at a time,
// who holds it; rewind() and length() may be called from any thread. Block contents are written by the step.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "adapters/overlay.h"
#include "kernels/kernels.h"
#include "model/kv_blocks.h"
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

  // Whether sequences that begin from now on share blocks; what is remembered is forgotten when it changes.
  // Off where a token's keys and values are not a function of the tokens up to it.
  void share(bool on) noexcept;
  bool shares() const noexcept { return shares_ && state_layout_.floats == 0; }
  void forget() noexcept { blocks_.forget(); }  // what is remembered
  std::int64_t context() const noexcept { return shape_.context; }
  KvBlocks::Counts blocks() const noexcept { return blocks_.counts(); }

 private:
  friend class KvSequence;
  KvLayout layout_;
  StateLayout state_layout_;
  Shape shape_;
  Buffer memory_;
  Buffer states_;
  KvBlocks blocks_;
  std::atomic<bool> shares_{true};
  std::mutex mutex_;  // of what follows
  std::vector<std::byte*> free_slots_;
};

// One sequence's state: how many tokens are in, and the blocks that hold them.
class KvSequence {
 public:
  // `mix`: the adapters that its tokens are computed with; null for none. `root`: what they add up to;
  // sequences with the same share blocks.
  explicit KvSequence(std::shared_ptr<KvPool> pool, std::shared_ptr<const AdapterMix> mix = nullptr,
                      std::uint64_t root = 0);
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
  std::uint64_t root() const noexcept { return root_; }
  bool shares() const noexcept { return shares_; }
  bool belongs_to(const KvPool& pool) const noexcept { return pool_.get() == &pool; }
  const std::byte* const* blocks() const noexcept { return blocks_.data(); }
  std::byte* block(std::int64_t position) const {
    return blocks_[static_cast<std::size_t>(position / kKvBlockTokens)];
  }
  std::int64_t num_blocks() const noexcept { return static_cast<std::int64_t>(blocks_.size()); }

  // Begins with the blocks of `prompt` that the pool remembers, but for its last token; returns their tokens.
  // REQUIRES an empty sequence.
  std::int64_t begin_with(std::span<const std::int32_t> prompt);

  // For the holder. Makes room for `tokens` in total. Error{invalid_argument} past the context, Error{budget}
  // where the pool is dry.
  void reserve(std::int64_t tokens);
  bool try_reserve(std::int64_t tokens);  // false where the pool is dry; else as reserve()
  // Tokens that need not run again; the others of length() do, before any new one (see sequence_state.h).
  std::int64_t computed() const noexcept { return computed_; }
  // A token that is in, or room for one that is to come. REQUIRES reserve().
  std::int32_t& token(std::int64_t position) const;
  // State of fixed size of layers that have some. REQUIRES reserve().
  const SequenceState& state() const noexcept { return state_; }
  void advance() noexcept;  // by a token. REQUIRES reserve(computed() + 1)
  void settle() noexcept;   // once a step is done
  // Back to the `length` tokens that there were before a step.
  void restore(std::int64_t length) noexcept { truncate(length); }

  // For the holder: what a file keeps of it. Of saved_length() tokens, as many blocks as hold them and the
  // state behind them, which is empty where there is none. Only whole blocks, where there is no such state.
  std::int64_t saved_length() const noexcept;
  std::span<std::byte> saved_block(std::int64_t index) const noexcept;
  std::span<std::byte> saved_state() const noexcept;
  // To restore it: begin with the tokens, fill what saved_block() and saved_state() lend, end. It shares with
  // nobody: what stands in a file need not be what its tokens would give. REQUIRES an empty sequence.
  void begin_restore(std::span<const std::int32_t> tokens);
  void end_restore(std::int64_t length) noexcept;

  // For others. Error{invalid_argument} unless 0 <= length <= length(), and while a step runs on it.
  void rewind(std::int64_t length);

 private:
  void truncate(std::int64_t length) noexcept;
  bool take_slot();
  bool own_last();
  void add(KvBlocks::Index block);
  std::byte* data(KvBlocks::Index block) const noexcept;

  std::shared_ptr<KvPool> pool_;
  const std::shared_ptr<const AdapterMix> mix_;
  const std::uint64_t root_;
  bool shares_;
  const std::uint64_t epoch_;  // of the pool's blocks, when it began
  std::atomic<bool> held_{false};
  std::atomic<std::int64_t> length_{0};
  std::int64_t computed_ = 0;
  SequenceState state_;
  std::vector<KvBlocks::Index> indices_;  // of its blocks
  std::vector<std::byte*> blocks_;        // where they lie
  std::size_t published_ = 0;             // of them, how many are for others to find
};

}  // namespace edgert
