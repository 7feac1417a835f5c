// Which blocks of a KV pool are free, which sequences hold, and which hold the beginning of a text for others
// to begin with: a radix tree whose nodes are blocks and whose digits are the 16 tokens of one.
//
// A block of the tree is full and is never written again. It stays after its sequences have gone, until a
// block is asked for and no free one is left: then the one that has not been used for longest goes, and none
// goes before those that follow it. Everything is allocated once.
//
// Threads: thread-safe. The tokens of a block outside the tree belong to the sequence that holds it.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>

#include "kernels/kernels.h"
#include "platform/memory.h"

namespace edgert {

class KvBlocks {
 public:
  using Index = std::int32_t;
  static constexpr Index kNone = -1;
  using Tokens = std::array<std::int32_t, kKvBlockTokens>;

  // Of the table itself; kUnaddressable at most.
  static std::uint64_t table_bytes(std::int64_t count);
  KvBlocks(std::int64_t count, std::shared_ptr<Budget> budget);

  // `count` blocks more, each with one holder; false, and none, where so many cannot be had.
  bool take(std::size_t count, std::span<Index> out);
  void hold(Index block);
  void release(Index block) noexcept;
  // The block to go on writing in the place of `block`, whose only holder the caller becomes: itself where
  // nobody else has to do with it, else a new one, `block` released; kNone where there is none.
  Index own(Index block);

  Tokens& tokens(Index block) const noexcept { return entries()[block].tokens; }

  // The block of the tree that holds `tokens` after `parent` (kNone: at the beginning), with a holder more;
  // kNone where there is none. `root` tells trees apart.
  Index find(std::uint64_t root, Index parent, std::span<const std::int32_t> tokens);
  // Makes a full block part of the tree, after `parent`, which is. Returns the one that stands for its
  // tokens: another, held in its place, where it was there already. kNone where the tree was emptied since
  // `epoch`.
  Index publish(std::uint64_t root, Index parent, Index block, std::uint64_t epoch);
  // Empties the tree; sequences keep what they hold.
  void forget() noexcept;
  std::uint64_t epoch() const noexcept;  // how often it was emptied

  struct Counts {
    std::int64_t free = 0;    // hold nothing
    std::int64_t idle = 0;    // in the tree, without a holder: may be taken
    std::int64_t cached = 0;  // in the tree
  };
  Counts counts() const noexcept;

 private:
  struct Entry {
    Tokens tokens;
    std::uint64_t root;
    Index parent;
    Index next;          // in its bucket, or of the free ones
    Index older, newer;  // among the idle ones
    std::int32_t holders;
    std::int32_t children;
    bool cached;
  };
  Entry* entries() const noexcept { return memory_.as<Entry>(); }
  Index* buckets() const noexcept { return reinterpret_cast<Index*>(entries() + count_); }
  Index& bucket(std::uint64_t root, Index parent, std::span<const std::int32_t> tokens) const noexcept;
  Index look_up(std::uint64_t root, Index parent, std::span<const std::int32_t> tokens) const noexcept;
  Index take_one() noexcept;
  void hold_one(Index block) noexcept;
  void release_one(Index block) noexcept;
  void remove(Index block) noexcept;  // from the tree
  void link(Index block) noexcept;    // as the newest idle one
  void unlink(Index block) noexcept;

  const std::int64_t count_;
  Buffer memory_;
  mutable std::mutex mutex_;  // of all that follows, and of the entries
  Index free_ = kNone;
  Index oldest_ = kNone, newest_ = kNone;
  Counts counts_;
  std::uint64_t epoch_ = 0;
};

}  // namespace edgert
