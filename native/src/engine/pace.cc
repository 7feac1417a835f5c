#include "engine/pace.h"

#include <algorithm>
#include <thread>

namespace edgert {

void Pace::wait(const std::atomic<bool>& cancelled, const std::function<void()>& poll) {
  constexpr auto kNap = std::chrono::milliseconds(5);
  const double interval_ms = this->interval_ms();
  if (interval_ms <= 0) return;
  Clock::time_point begin;
  {
    const std::lock_guard lock(mutex_);
    const auto interval =
        std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double, std::milli>(interval_ms));
    begin = last_ = std::max(Clock::now(), last_ + interval);
  }
  while (!cancelled.load(std::memory_order_relaxed) && this->interval_ms() > 0) {
    const auto left = begin - Clock::now();
    if (left <= Clock::duration::zero()) return;
    if (poll) poll();
    std::this_thread::sleep_for(std::min<Clock::duration>(left, kNap));
  }
}

}  // namespace edgert
