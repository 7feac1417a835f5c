// Reads ahead of need: what may be read when, and into which slots.
#include <algorithm>
#include <utility>

#include "experts/store.h"

namespace edgert {
namespace {

// With fewer slots for each read, those that prefetch reads are filling could be what a demand read waits
// for.
constexpr std::uint64_t kSlotsPerRead = 4;
constexpr double kLeastLikely = 0.5;  // to be used: less does not pay for what it may delay
constexpr double kUnknown = 0.5;      // how likely an expert is to be used of which the policy knows nothing

std::size_t at(int index) { return static_cast<std::size_t>(index); }

}  // namespace

void ExpertStore::prefetch(int layer, std::span<const int> experts) {
  const Row& r = row(layer);
  std::vector<int> wanted;
  for (const int expert : experts) wanted.push_back(entry_of(r, expert));
  std::reverse(wanted.begin(), wanted.end());
  const std::lock_guard lock(mutex_);
  drop_ahead();
  for (const int index : wanted) entries_[at(index)].ahead = true;
  asked_ = wanted;
  ahead_ = std::move(wanted);
  ahead_scans_ = is_scan(at(r.count), experts.size());
  pump();
}

void ExpertStore::preload(int layer) {
  const Row& r = row(layer);
  const std::lock_guard lock(mutex_);
  drop_ahead();
  guesses_ = true;
  ahead_scans_ = false;
  for (int index = r.first; index < r.first + r.count; ++index) {
    if (likelihood(index, entries_[at(index)].expected) < kLeastLikely) continue;
    entries_[at(index)].ahead = true;
    asked_.push_back(index);
  }
  ahead_ = asked_;
  std::sort(ahead_.begin(), ahead_.end(), [&](int a, int b) {
    const double of_a = likelihood(a, entries_[at(a)].expected);
    const double of_b = likelihood(b, entries_[at(b)].expected);
    return of_a != of_b ? of_a < of_b : a > b;
  });
  pump();
}

void ExpertStore::cancel_prefetch() {
  const std::lock_guard lock(mutex_);
  drop_ahead();
  pump();
}

void ExpertStore::expect(int layer, std::span<const float> probabilities) {
  const Row& r = row(layer);
  const std::lock_guard lock(mutex_);
  for (std::size_t i = 0; i < probabilities.size(); ++i) {
    entries_[at(r.first) + i].expected = probabilities[i];
  }
  policy_->expected(static_cast<int>(&r - rows_.data()), probabilities);
}

void ExpertStore::fill() {
  const std::lock_guard lock(mutex_);
  fill_.clear();
  for (std::size_t i = 0; i < entries_.size(); ++i) fill_.push_back(static_cast<int>(i));
  const auto place = [&](int index) {
    const Extent& extent = entries_[at(index)].where->extent;
    return std::pair(extent.file, extent.offset);
  };
  std::sort(fill_.begin(), fill_.end(), [&](int a, int b) { return place(a) > place(b); });
  pump();
}

void ExpertStore::set_prefetch_depth(int reads) {
  const std::lock_guard lock(mutex_);
  prefetch_depth_ = reads;
  pump();
}

int ExpertStore::prefetch_depth() const {
  const std::lock_guard lock(mutex_);
  return prefetch_depth_;
}

void ExpertStore::drop_ahead() noexcept {
  for (const int index : asked_) entries_[at(index)].ahead = false;
  asked_.clear();
  ahead_.clear();
  guesses_ = false;
}

bool ExpertStore::in_need() const noexcept {
  return demand_reads_ > 0 || std::any_of(requests_.begin(), requests_.end(),
                                          [](const Request* r) { return !r->waiting_.empty(); });
}

void ExpertStore::abandon(int index) noexcept {
  Entry& entry = entries_[at(index)];
  --prefetch_reads_;
  ++statistics_.prefetches_wasted;
  statistics_.wasted_bytes += entry.submitted;
  policy_->removed(index);
  entry.state = Residency::absent;
  entry.prefetched = false;
  drop_slots(entry);
  changed_.notify_all();
  pump();
}

double ExpertStore::likelihood(int index, double otherwise) const {
  return policy_->likelihood(index).value_or(otherwise);
}

void ExpertStore::pump() noexcept {
  try {
    while (pump_one()) {
    }
  } catch (...) {  // no memory, or the reader takes no more: what is needed will be asked for on demand
    drop_ahead();
    fill_.clear();
  }
}

bool ExpertStore::pump_one() {
  if (in_need() || prefetch_reads_ >= prefetch_depth_) return false;
  const bool ahead = next_absent(ahead_);
  std::vector<int>& queue = ahead ? ahead_ : fill_;
  if (!ahead && !next_absent(fill_)) return false;
  const int index = queue.back();
  const std::uint64_t bytes = slot_bytes(*entries_[at(index)].where);
  // Of steps that use every expert, the layer just used is the one needed again last.
  const bool scans = ahead_scans_ && passed_layer_ >= 0;
  const bool guess = ahead && guesses_;
  const double likely = guess ? likelihood(index, entries_[at(index)].expected) : 1;
  auto slot = take_slot(bytes, [&](const Entry& entry) {
    if (!ahead || entry.ahead ||
        capacity_ / (kSlotsPerRead * static_cast<std::uint64_t>(prefetch_depth_)) < bytes)
      return false;
    if (guess) return likelihood(static_cast<int>(&entry - entries_.data()), kUnknown) < likely;
    return !scans || entry.layer == passed_layer_;
  });
  if (!slot) {
    if (!ahead) fill_.clear();
    if (guess) ahead_.clear();  // what comes after it is no likelier, or later
    return false;
  }
  queue.pop_back();
  begin(index, std::move(*slot), Part::whole, ReadPriority::prefetch);
  if (guess) {
    policy_->guessed(index);
  } else {
    ahead ? policy_->passed(index)
          : policy_->used(index);  // what was only expected goes before what was used
  }
  return true;
}

// Whether `queue` still has something to read, which then stands last.
bool ExpertStore::next_absent(std::vector<int>& queue) const {
  while (!queue.empty() && entries_[at(queue.back())].state != Residency::absent) queue.pop_back();
  return !queue.empty();
}

}  // namespace edgert
