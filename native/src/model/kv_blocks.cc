#include "model/kv_blocks.h"

#include <algorithm>
#include <bit>
#include <limits>

namespace edgert {
namespace {

std::uint64_t buckets_of(std::int64_t count) {
  return std::bit_ceil(std::max<std::uint64_t>(1, static_cast<std::uint64_t>(count)));
}

}  // namespace

std::uint64_t KvBlocks::table_bytes(std::int64_t count) {
  if (count >= std::numeric_limits<Index>::max()) return kUnaddressable;
  return static_cast<std::uint64_t>(count) * sizeof(Entry) + buckets_of(count) * sizeof(Index);
}

KvBlocks::KvBlocks(std::int64_t count, std::shared_ptr<Budget> budget)
    : count_(count), memory_(std::move(budget), table_bytes(count), "table of KV blocks") {
  for (auto block = static_cast<Index>(count); block-- > 0;) {
    entries()[block].next = free_;
    free_ = block;
  }
  counts_.free = count;
  std::fill_n(buckets(), buckets_of(count), kNone);
}

bool KvBlocks::take(std::size_t count, std::span<Index> out) {
  const std::lock_guard lock(mutex_);
  if (static_cast<std::int64_t>(count) > counts_.free + counts_.idle) return false;
  for (std::size_t i = 0; i < count; ++i) out[i] = take_one();
  return true;
}

void KvBlocks::hold(Index block) {
  const std::lock_guard lock(mutex_);
  hold_one(block);
}

void KvBlocks::release(Index block) noexcept {
  const std::lock_guard lock(mutex_);
  release_one(block);
}

KvBlocks::Index KvBlocks::own(Index block) {
  const std::lock_guard lock(mutex_);
  Entry& entry = entries()[block];
  if (entry.holders == 1 && entry.children == 0) {
    if (entry.cached) remove(block);
    return block;
  }
  if (counts_.free + counts_.idle == 0) return kNone;
  const Index copy = take_one();
  entries()[copy].tokens = entry.tokens;
  release_one(block);
  return copy;
}

KvBlocks::Index KvBlocks::find(std::uint64_t root, Index parent, std::span<const std::int32_t> tokens) {
  const std::lock_guard lock(mutex_);
  const Index found = look_up(root, parent, tokens);
  if (found != kNone) hold_one(found);
  return found;
}

KvBlocks::Index KvBlocks::publish(std::uint64_t root, Index parent, Index block, std::uint64_t epoch) {
  const std::lock_guard lock(mutex_);
  if (epoch != epoch_) return kNone;
  Entry& entry = entries()[block];
  const Index there = look_up(root, parent, entry.tokens);
  if (there == block) return block;
  if (there != kNone) {  // by law 1 it holds the same bits
    hold_one(there);
    release_one(block);
    return there;
  }
  entry.root = root;
  entry.parent = parent;
  entry.cached = true;
  Index& first = bucket(root, parent, entry.tokens);
  entry.next = first;
  first = block;
  if (parent != kNone) ++entries()[parent].children;
  ++counts_.cached;
  return block;
}

void KvBlocks::forget() noexcept {
  const std::lock_guard lock(mutex_);
  ++epoch_;
  while (oldest_ != kNone) {
    const Index block = oldest_;
    unlink(block);
    remove(block);
    entries()[block].next = free_;
    free_ = block;
    ++counts_.free;
  }
  for (Index block = 0; block < static_cast<Index>(count_); ++block) {
    entries()[block].cached = false;
    entries()[block].children = 0;
  }
  std::fill_n(buckets(), buckets_of(count_), kNone);
  counts_.cached = 0;
}

std::uint64_t KvBlocks::epoch() const noexcept {
  const std::lock_guard lock(mutex_);
  return epoch_;
}

KvBlocks::Counts KvBlocks::counts() const noexcept {
  const std::lock_guard lock(mutex_);
  return counts_;
}

KvBlocks::Index& KvBlocks::bucket(std::uint64_t root, Index parent,
                                  std::span<const std::int32_t> tokens) const noexcept {
  std::uint64_t hash = root ^ (static_cast<std::uint64_t>(parent) * 0x9E3779B97F4A7C15ULL);
  for (const std::int32_t token : tokens) {
    hash = (hash ^ static_cast<std::uint32_t>(token)) * 0xBF58476D1CE4E5B9ULL;
    hash ^= hash >> 29;
  }
  return buckets()[hash & (buckets_of(count_) - 1)];
}

KvBlocks::Index KvBlocks::look_up(std::uint64_t root, Index parent,
                                  std::span<const std::int32_t> tokens) const noexcept {
  for (Index at = bucket(root, parent, tokens); at != kNone; at = entries()[at].next) {
    const Entry& entry = entries()[at];
    if (entry.root == root && entry.parent == parent && std::ranges::equal(entry.tokens, tokens)) return at;
  }
  return kNone;
}

// REQUIRES one that is free or idle.
KvBlocks::Index KvBlocks::take_one() noexcept {
  Index block = free_;
  if (block != kNone) {
    free_ = entries()[block].next;
    --counts_.free;
  } else {
    block = oldest_;  // those that follow it were used no later, and are older: it has no children left
    unlink(block);
    remove(block);
  }
  entries()[block].holders = 1;
  return block;
}

void KvBlocks::hold_one(Index block) noexcept {
  if (entries()[block].holders++ == 0) unlink(block);
}

void KvBlocks::release_one(Index block) noexcept {
  Entry& entry = entries()[block];
  if (--entry.holders > 0) return;
  if (entry.cached) {
    link(block);
    return;
  }
  entry.next = free_;
  free_ = block;
  ++counts_.free;
}

void KvBlocks::remove(Index block) noexcept {
  Entry& entry = entries()[block];
  Index* at = &bucket(entry.root, entry.parent, entry.tokens);
  while (*at != block) at = &entries()[*at].next;
  *at = entry.next;
  entry.cached = false;
  if (entry.parent != kNone) --entries()[entry.parent].children;
  --counts_.cached;
}

void KvBlocks::link(Index block) noexcept {
  Entry& entry = entries()[block];
  entry.older = newest_;
  entry.newer = kNone;
  (newest_ != kNone ? entries()[newest_].newer : oldest_) = block;
  newest_ = block;
  ++counts_.idle;
}

void KvBlocks::unlink(Index block) noexcept {
  const Entry& entry = entries()[block];
  (entry.older != kNone ? entries()[entry.older].newer : oldest_) = entry.newer;
  (entry.newer != kNone ? entries()[entry.newer].older : newest_) = entry.older;
  --counts_.idle;
}

}  // namespace edgert
