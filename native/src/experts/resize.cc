// A capacity that changes while steps run.
#include <algorithm>
#include <string>

#include "experts/store.h"
#include "platform/error.h"

namespace edgert {
namespace {

// Evicted in one go: giving a slot's pages back takes the system up to a millisecond, and steps wait
// meanwhile.
constexpr int kBatch = 4;

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
    drop_slot(entries_[static_cast<std::size_t>(index)].slot);
    ++evicted;
  }
  settle_charge();
  return evicted == most && statistics_.slot_bytes > capacity_;
}

void ExpertStore::settle_charge() noexcept {
  charge_.shrink(std::max(capacity_, statistics_.slot_bytes) + index_bytes_);
}

}  // namespace edgert
