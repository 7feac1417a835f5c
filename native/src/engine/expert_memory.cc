// How much of the budget the expert slots have: what a person or the controller says, less what adapters
// lack.
#include <algorithm>
#include <string>

#include "engine/model.h"
#include "platform/error.h"

namespace edgert {
namespace {

// Taken from the slots at first; then twice as much each time, up to all that there is.
constexpr std::uint64_t kFirstTaken = std::uint64_t{256} << 10;
constexpr std::uint64_t kMostTaken = std::uint64_t{1} << 44;

}  // namespace

void Model::set_memory(std::uint64_t bytes) {
  const std::lock_guard lock(taken_mutex_);
  Budget& budget = *runtime_->budget();
  const std::uint64_t used = budget.used_bytes();
  const std::uint64_t others = used - std::min(used, store_.statistics().capacity_bytes);
  if (bytes < others + store_.least_bytes()) {
    throw Error(ErrorKind::budget, "memory: a budget of " + std::to_string(bytes) +
                                       " bytes is too small; the smallest that works is " +
                                       std::to_string(others + store_.least_bytes()) + " bytes");
  }
  const bool taken = taken_bytes_ > 0 && store_.statistics().capacity_bytes == capacity_left_;
  const bool lower = bytes < budget.limit_bytes();
  if (!lower) budget.set_limit(bytes);
  set_expert_bytes(bytes - others);
  if (lower) budget.set_limit(bytes);
  // What adapters have of it is the slots' again once they are gone.
  if (taken) capacity_left_ = store_.statistics().capacity_bytes;
}

void Model::set_expert_bytes(std::uint64_t bytes) {
  store_.resize(std::min(bytes, plan_.expert_bytes));
  if (bytes >= plan_.expert_bytes) fill_ = true;
}

bool Model::take_from_experts(std::uint64_t bytes) {
  const std::lock_guard lock(step_mutex_);  // no expert is leased
  return take(bytes);
}

bool Model::take(std::uint64_t bytes) {
  const std::lock_guard lock(taken_mutex_);
  const std::uint64_t capacity = store_.statistics().capacity_bytes;
  const std::uint64_t least = store_.least_bytes();
  if (capacity <= least) return false;
  if (capacity != capacity_left_) taken_bytes_ = 0;
  capacity_left_ = std::max(least, capacity - std::min(bytes, capacity));
  store_.resize(capacity_left_);
  taken_bytes_ += capacity - capacity_left_;
  return true;
}

void Model::return_to_experts() {
  if (seekers_ > 0) return;
  const std::lock_guard lock(taken_mutex_);
  const std::uint64_t capacity = store_.statistics().capacity_bytes;
  if (capacity != capacity_left_) taken_bytes_ = 0;
  const std::uint64_t more = std::min(taken_bytes_, runtime_->budget()->available_bytes());
  if (more == 0) return;
  try {
    set_expert_bytes(capacity + more);
  } catch (const Error&) {  // it has been taken meanwhile
    return;
  }
  capacity_left_ = store_.statistics().capacity_bytes;
  taken_bytes_ -= more;
}

void Model::reserve(const std::shared_ptr<const AdapterMix>& mix) {
  for (std::uint64_t bytes = kFirstTaken;; bytes *= 2) {
    try {
      decoder_.reserve(mix);
      const std::uint64_t space =
          Sampler::space_bytes(recipe_.vocab_size + static_cast<int>(mix->added_tokens));
      if (mix->added_tokens > 0 && space > wide_sampling_.size())
        wide_sampling_ = Buffer(runtime_->budget(), space, "sampling of added tokens");
      break;
    } catch (const Error& error) {
      // Others may give back what was taken, again and again.
      if (error.kind() == ErrorKind::budget && bytes <= kMostTaken && take(bytes)) continue;
      return_to_experts();
      throw;
    }
  }
  return_to_experts();  // more was taken than it needed
}

}  // namespace edgert
