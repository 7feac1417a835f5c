// Holds a model to one decode step in so many milliseconds: less power and heat, for speed.
//
// Threads: everything may be called from any thread.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <mutex>

namespace edgert {

class Pace {
 public:
  void set_interval_ms(double milliseconds) noexcept { interval_ms_.store(milliseconds); }
  double interval_ms() const noexcept { return interval_ms_.load(); }
  // Returns when the next step may begin, or as soon as `cancelled`. `poll` is called every few milliseconds
  // and may throw; may be null.
  void wait(const std::atomic<bool>& cancelled, const std::function<void()>& poll);

 private:
  using Clock = std::chrono::steady_clock;
  std::atomic<double> interval_ms_{0};
  std::mutex mutex_;
  Clock::time_point last_{};  // when the last step began, or will
};

}  // namespace edgert
