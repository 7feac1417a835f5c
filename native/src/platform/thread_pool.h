// Fork-join over an index range.
//
// Threads: run() may be called from any thread, but not from a body; calls take turns, since models share the
// pool. The calling thread works too, as worker 0.
// Workers spin briefly after a job and then park; those that set_active() leaves out sleep until they are let
// in again. An exception thrown by the body is rethrown by run() on the calling thread after every worker has
// left the job. Results must not depend on which worker takes which index.
#pragma once

#include <memory>
#include <type_traits>
#include <utility>

namespace edgert {

class ThreadPool {
 public:
  // `threads` counts the caller: 1 starts no worker. REQUIRES 1 <= threads <= 1024.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const noexcept;
  // From any thread, at any time: only so many threads, the caller included, take part in the jobs to come.
  // REQUIRES 1 <= threads <= threads().
  void set_active(int threads);
  int active() const noexcept;

  // Calls body(begin, end, worker) over a partition of [0, count) in pieces of at most `grain` indices
  // (0: an even split); 0 <= worker < threads(). Returns when all of it is done.
  template <typename Body>
  void run(int count, int grain, Body&& body) {
    using B = std::remove_reference_t<Body>;
    run_erased(
        count, grain,
        [](void* b, int begin, int end, int worker) { (*static_cast<B*>(b))(begin, end, worker); },
        const_cast<void*>(static_cast<const void*>(std::addressof(body))));
  }

 private:
  using Erased = void (*)(void* body, int begin, int end, int worker);
  void run_erased(int count, int grain, Erased call, void* body);
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace edgert
