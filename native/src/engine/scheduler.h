// Continuous batching: a thread of its own runs the steps of a model over all requests there are.
//
// Requests join and leave between steps. Every request that decodes is in every step; prompts are run in
// pieces beside them, so short that those who stream hardly wait, each prompt its share. Requests are begun
// in order of arrival, as far as the KV cache holds them; where it runs dry later, the youngest gives its
// blocks back and is computed anew when there is room: by law 1 nobody can tell. One whose prompt begins as
// another's that is being run waits for that beginning. What a paced request's next token may be is worked
// out while the step runs that it is drawn from; beside others it is waited for as long as the step took, and
// later it sits out until it may draw. An error ends the request that met it and no other.
//
// Threads: everything may be called from any thread; events() by one at a time. Ownership: keeps the model.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <unordered_map>
#include <vector>

#include "engine/model.h"
#include "engine/step_cost.h"

namespace edgert {

struct Request {
  AdapterMix mix;
  std::vector<std::int32_t> prompt;
  std::shared_ptr<Sampler> sampler;  // which knows the prompt
  std::int64_t max_tokens = 0;       // at least 1
  std::vector<std::int32_t> ends;    // tokens after which nothing follows
  bool paced = false;                // each draw after the first waits for proceed()
};

enum class Finish { none, stop, length, cancelled, error };

// A token of a request, or its end, or both.
struct RequestEvent {
  std::uint64_t request = 0;
  std::optional<Sample> sample;
  Finish finish = Finish::none;
  std::exception_ptr error;        // of Finish::error
  std::int64_t cached_tokens = 0;  // of the prompt, found in the KV cache
  double queue_s = 0;              // until it began to run
};

struct SchedulerStatistics {
  std::int64_t running = 0;
  std::int64_t waiting = 0;
  std::uint64_t cached_tokens = 0;  // of prompts, that did not have to run
  std::uint64_t prompt_tokens = 0;
  std::uint64_t preempted = 0;  // how often one had to give its blocks back
  std::uint64_t steps = 0;
};

class Scheduler {
 public:
  // `queue`: requests that may wait.
  Scheduler(std::shared_ptr<Model> model, std::size_t queue);
  ~Scheduler();  // as close()
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // The request's number; none where too many wait. Error{invalid_argument} for what can never run.
  std::optional<std::uint64_t> submit(Request request);
  // Ends it within a token, with Finish::cancelled; nothing where it has ended.
  void cancel(std::uint64_t request) noexcept;
  // A paced request may draw its next token.
  void proceed(std::uint64_t request) noexcept;

  // Waits for events and returns them, each request's in order; empty once closed and all are returned.
  std::vector<RequestEvent> events();
  // Cancels everything, takes no more, and ends the thread.
  void close() noexcept;

  SchedulerStatistics statistics() const;

 private:
  using Clock = std::chrono::steady_clock;
  struct Job;
  using Jobs = std::vector<std::shared_ptr<Job>>;
  // What a job is to run in a step.
  struct Span {
    std::shared_ptr<Job> job;
    std::span<const std::int32_t> tokens;
    bool draws = false;
  };

  void run() noexcept;
  bool turn();  // false where there is nothing to do
  void take_in();
  void reap(Jobs& jobs);
  void admit();
  bool admit(const std::shared_ptr<Job>& job);
  bool follows(const Job& job, std::int64_t found) const;
  std::vector<Span> plan() const;
  bool make_room(std::vector<Span>& spans);
  bool preempt_after(const Job& job, std::vector<Span>& spans);
  void step(const std::vector<Span>& spans);
  void attempt(const std::vector<Span>& spans);
  bool may_draw(const Job& job, const std::optional<Clock::time_point>& until);
  void put_off(Job& job);
  void drew(Job& job, Sample sample);
  void end(Job& job, Finish finish, std::exception_ptr error = nullptr) noexcept;
  void emit(RequestEvent event) noexcept;
  void wait_for_change(bool idle);

  const std::shared_ptr<Model> model_;
  const std::size_t queue_;

  mutable std::mutex mutex_;  // of what follows
  std::condition_variable changed_;
  std::condition_variable happened_;  // events
  std::unordered_map<std::uint64_t, std::shared_ptr<Job>> jobs_;
  std::vector<std::shared_ptr<Job>> arrived_;
  std::vector<RequestEvent> events_;
  SchedulerStatistics statistics_;
  std::size_t waiting_count_ = 0;  // submitted, and not begun
  std::uint64_t next_ = 1;
  bool change_ = false;  // something for the thread to look at
  bool ended_ = false;   // the thread

  std::atomic<bool> closing_{false};
  // The thread's own:
  std::deque<std::shared_ptr<Job>> waiting_;  // by number
  Jobs running_;                              // by number
  StepCost cost_;
  const int process_;
  std::mutex join_mutex_;  // several may close
  std::thread thread_;
};

}  // namespace edgert
