#include "experts/simulation.h"

#include <algorithm>
#include <string>

#include "experts/store.h"
#include "platform/error.h"

namespace edgert {
namespace {

std::size_t at(int index) { return static_cast<std::size_t>(index); }

std::vector<int> counts_of(const std::vector<std::vector<std::uint64_t>>& sizes) {
  std::vector<int> counts;
  for (const auto& row : sizes) counts.push_back(static_cast<int>(row.size()));
  return counts;
}

}  // namespace

StoreSimulation::StoreSimulation(const std::vector<std::vector<std::uint64_t>>& sizes,
                                 std::uint64_t capacity_bytes, Eviction kind)
    : capacity_(capacity_bytes), rows_(counts_of(sizes)), policy_(make_policy(kind, rows_)) {
  for (const auto& row : sizes) {
    first_.push_back(static_cast<int>(sizes_.size()));
    sizes_.insert(sizes_.end(), row.begin(), row.end());
  }
  resident_.resize(sizes_.size());
}

StoreSimulation::StoreSimulation(const std::vector<std::vector<std::uint64_t>>& sizes,
                                 std::uint64_t capacity_bytes, const std::vector<RoutedStep>& future)
    : StoreSimulation(sizes, capacity_bytes, Eviction::lru) {
  for (const RoutedStep& step : future) check(step);
  policy_ = make_belady(rows_, future);
}

StoreSimulation::Counts StoreSimulation::run(const std::vector<RoutedStep>& steps) {
  counts_ = {};
  for (const RoutedStep& step : steps) {
    check(step);
    for (std::size_t row = 0; row < step.size(); ++row) acquire(static_cast<int>(row), step[row]);
  }
  return counts_;
}

void StoreSimulation::check(const RoutedStep& step) const {
  if (step.size() != rows_.size()) {
    throw Error(ErrorKind::invalid_argument, "steps: found " + std::to_string(step.size()) +
                                                 " rows of experts, allowed " + std::to_string(rows_.size()));
  }
  for (std::size_t row = 0; row < step.size(); ++row) {
    for (const int expert : step[row]) {
      if (expert >= 0 && expert < rows_[row]) continue;
      throw Error(ErrorKind::invalid_argument, "steps: row " + std::to_string(row) + ": found expert " +
                                                   std::to_string(expert) + ", allowed 0 to " +
                                                   std::to_string(rows_[row] - 1));
    }
  }
}

void StoreSimulation::acquire(int row, const std::vector<int>& experts) {
  const bool scan = ExpertStore::is_scan(at(rows_[at(row)]), experts.size());
  const auto touch = [&](int entry) {
    scan ? policy_->passed(entry) : policy_->used(entry);
    pinned_.push_back(entry);
  };
  std::vector<int> missing;
  for (const int expert : experts) {
    const int entry = first_[at(row)] + expert;
    if (!resident_[at(entry)]) {
      missing.push_back(entry);
    } else {
      touch(entry);
      ++counts_.hits;
    }
  }
  policy_->visited(row, experts, scan);
  for (const int entry : missing) {
    ++counts_.misses;
    counts_.bytes += sizes_[at(entry)];
    // A request that is larger than the slots gives back what was served first.
    bool room = make_room(sizes_[at(entry)]);
    while (!room && !pinned_.empty()) {
      pinned_.erase(pinned_.begin());
      room = make_room(sizes_[at(entry)]);
    }
    if (!room) continue;
    touch(entry);
    resident_[at(entry)] = true;
    used_ += sizes_[at(entry)];
  }
  pinned_.clear();
}

bool StoreSimulation::make_room(std::uint64_t bytes) {
  if (bytes > capacity_) return false;
  const std::uint64_t free = capacity_ - used_;
  if (bytes <= free) return true;
  const auto victims = choose_victims(
      *policy_, bytes - free, [&](int entry) { return sizes_[at(entry)]; },
      [&](int entry) { return std::find(pinned_.begin(), pinned_.end(), entry) == pinned_.end(); });
  if (!victims) return false;
  for (const int entry : *victims) {
    policy_->removed(entry);
    resident_[at(entry)] = false;
    used_ -= sizes_[at(entry)];
    ++counts_.evictions;
  }
  return true;
}

}  // namespace edgert
