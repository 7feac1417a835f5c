// What a step holds of the store: the request for a layer's experts, and the leases that it gives out.
#include <chrono>
#include <utility>

#include "experts/store.h"
#include "platform/error.h"

namespace edgert {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kCancelPoll = std::chrono::milliseconds(20);

std::size_t at(int index) { return static_cast<std::size_t>(index); }

}  // namespace

// Moves what has been read to ready_, and begins what has no read yet or whose read another began and failed.
void ExpertStore::Request::gather() {
  for (auto it = reading_.begin(); it != reading_.end();) {
    const auto [index, whole, ours] = *it;
    Entry& entry = store_.entries_[at(index)];
    if (entry.state == Residency::reading) {
      ++it;
      continue;
    }
    it = reading_.erase(it);
    if (store_.suits(entry, whole)) {
      ready_.insert(ready_.begin(), index);
      continue;
    }
    --entry.pins;  // its read failed, or was of the base alone
    if (ours) std::rethrow_exception(entry.error);
    waiting_.push_back({index, whole});
  }
  store_.issue(*this);
}

std::optional<ExpertStore::Lease> ExpertStore::Request::take() {
  if (ready_.empty()) return std::nullopt;
  const int index = ready_.back();
  ready_.pop_back();
  return Lease(&store_, index, store_.entries_[at(index)].part == Part::base);
}

std::optional<ExpertStore::Lease> ExpertStore::Request::next_ready() {
  const std::lock_guard lock(store_.mutex_);
  gather();
  return take();
}

std::optional<ExpertStore::Lease> ExpertStore::Request::next() {
  std::unique_lock lock(store_.mutex_);
  gather();
  if (ready_.empty() && (!reading_.empty() || !waiting_.empty())) {
    const auto start = Clock::now();
    while (ready_.empty()) {
      if (cancelled_.load(std::memory_order_relaxed))
        throw Error(ErrorKind::cancelled, "cancelled while waiting for an expert");
      store_.changed_.wait_for(lock, kCancelPoll);
      gather();
    }
    store_.statistics_.stall_s += std::chrono::duration<double>(Clock::now() - start).count();
  }
  return take();
}

ExpertStore::Request::~Request() {
  const std::lock_guard lock(store_.mutex_);
  std::erase(store_.requests_, this);
  for (const int index : ready_) --store_.entries_[at(index)].pins;
  for (const Read& read : reading_) --store_.entries_[at(read.entry)].pins;
  store_.trim(static_cast<int>(store_.entries_.size()));
  store_.pump();
}

ExpertStore::Lease::Lease(ExpertStore* store, int index, bool base) noexcept
    : store_(store), entry_(index), base_(base) {
  const Entry& entry = store->entries_[at(index)];
  expert_ = entry.expert;
  formats_ = entry.where->formats;
  data_ = entry.slot.data();
  change_ = entry.change;
}

ExpertStore::Lease::Lease(Lease&& other) noexcept
    : store_(std::exchange(other.store_, nullptr)),
      entry_(other.entry_),
      expert_(other.expert_),
      formats_(other.formats_),
      base_(other.base_),
      data_(other.data_),
      change_(std::move(other.change_)) {}

void ExpertStore::Lease::set_change(Change change) {
  change_ = std::move(change);
  const std::lock_guard lock(store_->mutex_);
  store_->entries_[at(entry_)].change = change_;
}

ExpertStore::Lease::~Lease() {
  if (store_ != nullptr) store_->unpin(entry_);
}

}  // namespace edgert
