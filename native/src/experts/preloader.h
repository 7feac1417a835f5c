// Reads ahead of need what a predictor expects, and tells the store's eviction what that is.
//
// It works for steps of one row (a decode of one sequence): steps of more ask for experts of all kinds. What
// is expected always goes to the eviction policy; whether it is read ahead too is on trial (trial.h), or as
// force() has it.
//
// Threads: step(), routed() and end_step() by one step at a time; force() and statistics() from any thread.
// Ownership: borrows the store.
#pragma once

#include <functional>
#include <mutex>
#include <optional>
#include <vector>

#include "experts/lookahead.h"
#include "experts/store.h"
#include "experts/trial.h"

namespace edgert {

struct PreloadStatistics {
  std::uint64_t expected = 0;  // see Lookahead::Counts
  std::uint64_t used = 0;
  std::uint64_t steps = 0;     // that were looked ahead in
  std::uint64_t steps_on = 0;  // of them, those that read ahead
  bool on = false;             // the next would
};

class Preloader {
 public:
  using Clock = std::function<double()>;  // seconds

  // `layers`: of the store, in order. A null clock is the system's steady one.
  Preloader(ExpertStore& store, Lookahead lookahead, std::vector<int> layers, Clock clock = {});

  void begin_step();
  // The step's token has been routed at `sight.row`, and its own experts have been asked for.
  void routed(const Sight& sight);
  void end_step();  // not after a failure

  void force(std::optional<bool> on);  // reading ahead; none: as the trial has it
  PreloadStatistics statistics() const;

 private:
  ExpertStore& store_;
  Lookahead lookahead_;
  const std::vector<int> layers_;
  const Clock clock_;
  double began_ = 0;
  bool reads_ = false;  // in this step
  mutable std::mutex mutex_;
  std::optional<bool> forced_;
  Trial trial_;
  PreloadStatistics statistics_;
};

}  // namespace edgert
