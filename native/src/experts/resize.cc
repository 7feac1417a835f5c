// A capacity that changes while steps run.
#include <algorithm>
#include <cstring>
#include <functional>
#include <string>
#include <utility>

#include "experts/store.h"
#include "platform/error.h"

namespace edgert {
namespace {

// Evicted in one go: to move an expert and to give a slot's pages back takes up to two milliseconds, and
// steps wait meanwhile.
constexpr int kBatch = 2;

}  // namespace

std::uint64_t ExpertStore::least_bytes() const noexcept {
  std::uint64_t largest = 0;
  for (const Entry& entry : entries_) largest = std::max(largest, slot_bytes(*entry.where));
  return std::min<std::uint64_t>(2, entries_.size()) * largest;
}

void ExpertStore::resize(std::uint64_t capacity_bytes) {
  if (capacity_bytes < least_bytes()) {
    throw Error(ErrorKind::budget, "expert slots: " + std::to_string(capacity_bytes) +
                                       " bytes are too few; the least that work are " +
                                       std::to_string(least_bytes()));
  }
  {
    const std::lock_guard lock(mutex_);
    if (capacity_bytes > capacity_) {
      slots_.grow(capacity_bytes);
      charge_.resize(std::max(capacity_bytes, statistics_.slot_bytes) + index_bytes_, "expert slots");
    }
    capacity_ = statistics_.capacity_bytes = capacity_bytes;
    if (!evicts_) choose_policy();
  }
  for (bool more = true; more;) {
    const std::lock_guard lock(mutex_);
    more = trim(kBatch);
  }
  const std::lock_guard lock(mutex_);
  pump();
}

// Where not every expert fits any more; what the free policy had seen of uses is forgotten.
void ExpertStore::choose_policy() {
  std::vector<int> counts;
  std::uint64_t total = 0;
  for (const Row& row : rows_) counts.push_back(row.count);
  for (const Entry& entry : entries_) total += slot_bytes(*entry.where);
  if (total <= capacity_) return;
  policy_ = make_policy(eviction_, counts);
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    if (entries_[i].state != Residency::absent) policy_->used(static_cast<int>(i));
  }
  evicts_ = true;
}

bool ExpertStore::trim(int most) noexcept {
  const Evictable admitted = [this](int index) { return evictable(index); };
  int evicted = 0;
  while (statistics_.slot_bytes > capacity_ && evicted < most) {
    const int index = policy_->victim(admitted);
    if (index < 0) break;
    evict(index);
    give_back(std::move(entries_[static_cast<std::size_t>(index)].slot));
    ++evicted;
  }
  settle_charge();
  return evicted == most && statistics_.slot_bytes > capacity_;
}

// The expert in the last place moves into the one that is free: so the system gets whole huge pages, and what
// is left keeps its own.
void ExpertStore::give_back(SlotPool::Slot slot) noexcept {
  Entry* last = nullptr;
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    Entry& entry = entries_[i];
    if (entry.slot.size() != slot.size() || !evictable(static_cast<int>(i))) continue;
    const std::byte* place = last == nullptr ? slot.data() : last->slot.data();
    if (std::less<>{}(place, entry.slot.data())) last = &entry;
  }
  if (last != nullptr) {
    std::memcpy(slot.data(), last->slot.data(), slot.size());
    std::swap(slot, last->slot);
  }
  drop_slot(slot);
}

void ExpertStore::settle_charge() noexcept {
  charge_.shrink(std::max(capacity_, statistics_.slot_bytes) + index_bytes_);
}

}  // namespace edgert
