// What a store of experts would read for a routing: the policies and the accounting of ExpertStore without
// storage, threads or prefetch. Where each request fits the slots, its counts are the store's.
//
// Threads: one at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "experts/eviction.h"

namespace edgert {

using RoutedStep = std::vector<std::vector<int>>;  // the distinct experts that a step uses, by row

// Belady's optimum over the steps that will run, all of them and no others.
std::unique_ptr<EvictionPolicy> make_belady(std::span<const int> rows, const std::vector<RoutedStep>& future);

class StoreSimulation {
 public:
  struct Counts {
    std::uint64_t hits = 0;
    std::uint64_t misses = 0;
    std::uint64_t evictions = 0;
    std::uint64_t bytes = 0;  // read
  };

  // `sizes`: bytes of each expert by row. Error{invalid_argument} for steps of another model.
  StoreSimulation(const std::vector<std::vector<std::uint64_t>>& sizes, std::uint64_t capacity_bytes,
                  Eviction kind);
  StoreSimulation(const std::vector<std::vector<std::uint64_t>>& sizes, std::uint64_t capacity_bytes,
                  const std::vector<RoutedStep>& future);  // the optimum

  Counts run(const std::vector<RoutedStep>& steps);  // one after the other, and after those of earlier calls

 private:
  void check(const RoutedStep& step) const;
  void acquire(int row, const std::vector<int>& experts);
  bool make_room(std::uint64_t bytes);

  std::uint64_t capacity_;
  std::vector<int> rows_;   // how many experts each has
  std::vector<int> first_;  // entry of each row's expert 0
  std::vector<std::uint64_t> sizes_;
  std::unique_ptr<EvictionPolicy> policy_;
  std::vector<bool> resident_;
  std::vector<int> pinned_;  // by the request under way, first come first
  std::uint64_t used_ = 0;
  Counts counts_;
};

}  // namespace edgert
