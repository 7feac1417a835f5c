// A mutex that is given to those who wait for it in the order in which they came.
//
// Where one thread locks it again as soon as it has let go of it, others still get their turn.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace edgert {

class FairMutex {
 public:
  void lock() {
    std::unique_lock held(mutex_);
    const std::uint64_t mine = next_++;
    changed_.wait(held, [&] { return turn_ == mine; });
  }
  void unlock() {
    const std::lock_guard held(mutex_);
    ++turn_;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::uint64_t next_ = 0;
  std::uint64_t turn_ = 0;
};

}  // namespace edgert
