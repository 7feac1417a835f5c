#include "platform/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "platform/cpu.h"
#include "platform/error.h"
#include "platform/thread.h"

namespace edgert {
namespace {

using Clock = std::chrono::steady_clock;
// Longer than the scalar work between two jobs of a step, shorter than a user's thought.
constexpr auto kSpin = std::chrono::microseconds(50);
constexpr int kPausesBetweenClocks = 32;

inline void pause() noexcept {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

// A job is cut into pieces that the caller and the workers claim one by one. `claim` holds the job's
// generation (high half) and the pieces not claimed yet (low half); claiming is a compare-exchange, so a
// worker that comes late to a job that is over finds nothing to claim, and nobody waits for it. While a
// piece is unclaimed the job cannot end, so a successful exchange also proves that the job's fields, read
// before it, were those of this generation.
struct ThreadPool::State {
  explicit State(int threads_) : threads(threads_), spins(threads_ <= usable_cores()), active(threads_) {}
  ~State();

  void publish(std::uint32_t pieces_);
  void work(int worker);
  void run_piece(std::uint32_t piece, std::uint32_t of, int worker);
  void worker_loop(int worker);
  bool spin_until(const auto& ready) const;
  void wait_done(std::uint32_t pieces_);

  static std::uint32_t generation(std::uint64_t word) { return static_cast<std::uint32_t>(word >> 32); }
  static std::uint32_t unclaimed(std::uint64_t word) { return static_cast<std::uint32_t>(word); }

  const int threads;
  const bool spins;         // not where threads outnumber cores: a spinning one would hold up a working one
  std::atomic<int> active;  // changed with `mutex` held

  alignas(64) std::atomic<std::uint64_t> claim{0};
  alignas(64) std::atomic<std::uint32_t> done{0};
  // The job; written by the caller between jobs.
  alignas(64) std::atomic<Erased> call{nullptr};
  std::atomic<void*> body{nullptr};
  std::atomic<int> count{0};
  std::atomic<int> grain{0};
  std::atomic<std::uint32_t> pieces{0};
  std::atomic<bool> failed{false};
  std::exception_ptr failure;  // of the thread that set `failed`

  alignas(64) std::atomic<bool> stop{false};
  std::atomic<int> parked{0};
  std::atomic<bool> caller_parked{false};
  std::mutex turn;   // of the callers
  std::mutex mutex;  // for parking only
  std::condition_variable job_ready;
  std::condition_variable job_done;
  std::condition_variable let_in;  // workers from `active` on wait for it
  std::vector<std::thread> workers;
};

ThreadPool::State::~State() {
  {
    const std::lock_guard lock(mutex);
    stop = true;
  }
  let_in.notify_all();
  publish(0);
  for (auto& worker : workers) worker.join();
}

void ThreadPool::State::publish(std::uint32_t pieces_) {
  const std::uint64_t next =
      std::uint64_t{generation(claim.load(std::memory_order_relaxed)) + 1u} << 32 | pieces_;
  // Sequentially consistent, as is the count of parked workers: one side sees the other. An exchange, because
  // qemu orders a plain store and the load after it less strictly than AArch64 does, and a wake-up would be
  // lost.
  claim.exchange(next);
  if (parked.load() > 0) {
    {
      std::lock_guard lock(mutex);
    }
    job_ready.notify_all();
  }
}

bool ThreadPool::State::spin_until(const auto& ready) const {
  if (ready()) return true;
  if (!spins) return false;
  const auto end = Clock::now() + kSpin;
  do {
    for (int i = 0; i < kPausesBetweenClocks; ++i) {
      pause();
      if (ready()) return true;
    }
  } while (Clock::now() < end);
  return false;
}

void ThreadPool::State::run_piece(std::uint32_t piece, std::uint32_t of, int worker) {
  if (!failed.load(std::memory_order_relaxed)) {
    const std::int64_t n = count.load(std::memory_order_relaxed);
    const std::int64_t step = grain.load(std::memory_order_relaxed);
    const std::int64_t begin = step > 0 ? piece * step : n * piece / of;
    const std::int64_t end = step > 0 ? std::min(n, begin + step) : n * (piece + 1) / of;
    try {
      call.load(std::memory_order_relaxed)(body.load(std::memory_order_relaxed), static_cast<int>(begin),
                                           static_cast<int>(end), worker);
    } catch (...) {
      if (!failed.exchange(true)) failure = std::current_exception();
    }
  }
  if (done.fetch_add(1) + 1 == of && caller_parked.load()) {
    {
      std::lock_guard lock(mutex);
    }
    job_done.notify_one();
  }
}

void ThreadPool::State::work(int worker) {
  std::uint64_t word = claim.load(std::memory_order_acquire);
  while (unclaimed(word) > 0) {
    const std::uint32_t of = pieces.load(std::memory_order_relaxed);
    if (claim.compare_exchange_weak(word, word - 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
      run_piece(of - unclaimed(word), of, worker);
      word = claim.load(std::memory_order_acquire);
    }
  }
}

void ThreadPool::State::worker_loop(int worker) {
  std::uint32_t seen = 0;
  const auto changed = [&] { return generation(claim.load()) != seen; };
  for (;;) {
    if (worker >= active.load(std::memory_order_relaxed)) {
      std::unique_lock lock(mutex);
      let_in.wait(lock, [&] { return stop || worker < active.load(std::memory_order_relaxed); });
    }
    if (!spin_until(changed)) {
      std::unique_lock lock(mutex);
      parked.fetch_add(1);
      job_ready.wait(lock, changed);
      parked.fetch_sub(1);
    }
    if (stop) return;
    seen = generation(claim.load());
    if (worker < active.load(std::memory_order_relaxed)) work(worker);
  }
}

void ThreadPool::State::wait_done(std::uint32_t pieces_) {
  const auto complete = [&] { return done.load() == pieces_; };
  if (spin_until(complete)) return;
  std::unique_lock lock(mutex);
  caller_parked.exchange(true);  // as in publish()
  job_done.wait(lock, complete);
  caller_parked = false;
}

ThreadPool::ThreadPool(int threads) {
  if (threads < 1 || threads > 1024) {
    throw Error(ErrorKind::invalid_argument, "threads: " + std::to_string(threads) + " is not in 1 to 1024");
  }
  state_ = std::make_unique<State>(threads);
  for (int worker = 1; worker < threads; ++worker) {
    state_->workers.push_back(start_thread("edgert-work-" + std::to_string(worker),
                                           [state = state_.get(), worker] { state->worker_loop(worker); }));
  }
}

ThreadPool::~ThreadPool() = default;

int ThreadPool::threads() const noexcept { return state_->threads; }
int ThreadPool::active() const noexcept { return state_->active.load(std::memory_order_relaxed); }

void ThreadPool::set_active(int threads) {
  if (threads < 1 || threads > state_->threads) {
    throw Error(ErrorKind::invalid_argument, "threads: found " + std::to_string(threads) + ", allowed 1 to " +
                                                 std::to_string(state_->threads) +
                                                 ", with which it was loaded");
  }
  {
    const std::lock_guard lock(state_->mutex);
    state_->active.store(threads, std::memory_order_relaxed);
  }
  state_->let_in.notify_all();
}

void ThreadPool::run_erased(int count, int grain, Erased call, void* body) {
  if (count <= 0) return;
  State& state = *state_;
  const int pieces =
      grain > 0 ? (count - 1) / grain + 1 : std::min(count, state.active.load(std::memory_order_relaxed));
  if (pieces == 1) return call(body, 0, count, 0);
  const std::lock_guard lock(state.turn);
  state.call.store(call, std::memory_order_relaxed);
  state.body.store(body, std::memory_order_relaxed);
  state.count.store(count, std::memory_order_relaxed);
  state.grain.store(grain, std::memory_order_relaxed);
  state.pieces.store(static_cast<std::uint32_t>(pieces), std::memory_order_relaxed);
  state.failed.store(false, std::memory_order_relaxed);
  state.done.store(0, std::memory_order_relaxed);
  state.publish(static_cast<std::uint32_t>(pieces));
  state.work(0);
  state.wait_done(static_cast<std::uint32_t>(pieces));
  if (state.failed) std::rethrow_exception(std::exchange(state.failure, nullptr));
}

}  // namespace edgert
