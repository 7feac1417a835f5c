#include "engine/scheduler.h"

#include <unistd.h>

#include <algorithm>
#include <utility>

#include "platform/error.h"
#include "platform/thread.h"

namespace edgert {
namespace {

constexpr double kStreamingStep = 0.2;  // seconds that prompts may hold up those who stream
constexpr double kPromptStep = 1.0;     // where nobody does: how soon an arrival is looked at
constexpr int kFirstRows = 64;          // of a step, before anything is known
constexpr int kFewestRows = kKvBlockTokens;
constexpr std::size_t kMaxRunning = 256;

std::int64_t common_prefix(std::span<const std::int32_t> a, std::span<const std::int32_t> b) {
  return std::ranges::mismatch(a, b).in1 - a.begin();
}

}  // namespace

struct Scheduler::Job {
  Job(std::uint64_t the_number, Request request)
      : number(the_number), given(std::move(request)), tokens(given.prompt), submitted(Clock::now()) {}

  const std::uint64_t number;
  Request given;
  std::atomic<bool> cancelled{false};
  std::atomic<bool> may_draw{true};

  // The scheduler's thread's:
  std::vector<std::int32_t> tokens;  // the prompt, and what was drawn
  std::shared_ptr<KvSequence> sequence;
  std::int64_t drawn = 0;
  bool begun = false;
  bool ended = false;
  bool late = false;  // could not draw when a step was ready to
  std::int64_t cached = 0;
  Clock::time_point submitted;
  double queue_s = 0;

  std::int64_t length() const { return static_cast<std::int64_t>(tokens.size()); }
  std::int64_t left() const { return length() - sequence->length(); }  // to be run
  bool may_run() const { return may_draw || !late; }
  bool prefills() const { return left() > 1; }
};

Scheduler::Scheduler(std::shared_ptr<Model> model, std::size_t queue)
    : model_(std::move(model)),
      queue_(queue),
      process_(getpid()),
      thread_(start_thread("edgert-steps", [this] { run(); })) {}

Scheduler::~Scheduler() { close(); }

void Scheduler::close() noexcept {
  if (getpid() != process_) {  // the thread stayed behind when this process was forked
    if (thread_.joinable()) thread_.detach();
    return;
  }
  closing_ = true;
  {
    const std::lock_guard lock(mutex_);
    change_ = true;
    changed_.notify_all();
  }
  const std::lock_guard lock(join_mutex_);
  if (thread_.joinable()) thread_.join();
}

std::optional<std::uint64_t> Scheduler::submit(Request request) {
  const std::int64_t context = model_->plan().context;
  if (request.prompt.empty()) throw Error(ErrorKind::invalid_argument, "prompt: no tokens");
  const std::vector<std::int32_t> soft = model_->soft_prompt(request.mix);
  request.prompt.insert(request.prompt.begin(), soft.begin(), soft.end());
  const auto tokens = static_cast<std::int64_t>(request.prompt.size());
  if (tokens >= context) {
    throw Error(ErrorKind::invalid_argument, "prompt: found " + std::to_string(tokens) +
                                                 " tokens, allowed are " + std::to_string(context - 1));
  }
  if (!request.sampler) throw Error(ErrorKind::invalid_argument, "a request needs a sampler");
  if (request.max_tokens < 1)
    throw Error(ErrorKind::invalid_argument,
                "max_tokens: found " + std::to_string(request.max_tokens) + ", allowed 1 or more");
  request.max_tokens = std::min(request.max_tokens, context - tokens);
  const std::lock_guard lock(mutex_);
  if (closing_) throw Error(ErrorKind::invalid_argument, "the scheduler is closed");
  if (waiting_count_ >= queue_) return std::nullopt;
  const std::uint64_t number = next_++;
  auto job = std::make_shared<Job>(number, std::move(request));
  arrived_.reserve(arrived_.size() + 1);
  jobs_.emplace(number, job);
  arrived_.push_back(std::move(job));
  ++waiting_count_;
  change_ = true;
  changed_.notify_all();
  return number;
}

void Scheduler::cancel(std::uint64_t request) noexcept {
  const std::lock_guard lock(mutex_);
  const auto found = jobs_.find(request);
  if (found == jobs_.end()) return;
  found->second->cancelled = true;
  change_ = true;
  changed_.notify_all();
}

void Scheduler::proceed(std::uint64_t request) noexcept {
  const std::lock_guard lock(mutex_);
  const auto found = jobs_.find(request);
  if (found == jobs_.end()) return;
  found->second->may_draw = true;
  change_ = true;
  changed_.notify_all();
}

std::vector<RequestEvent> Scheduler::events() {
  std::unique_lock lock(mutex_);
  happened_.wait(lock, [&] { return !events_.empty() || ended_; });
  return std::exchange(events_, {});
}

SchedulerStatistics Scheduler::statistics() const {
  const std::lock_guard lock(mutex_);
  SchedulerStatistics out = statistics_;
  out.waiting = static_cast<std::int64_t>(waiting_count_);
  return out;
}

// --- the thread ---------------------------------------------------------------------------------------

void Scheduler::run() noexcept {
  while (true) {
    bool busy = false;
    try {
      busy = turn();
    } catch (...) {  // of the scheduling itself, such as a heap that is used up: nobody is to wait for ever
      for (const auto& job : running_) end(*job, Finish::error, std::current_exception());
      running_.clear();
    }
    if (closing_ && running_.empty() && waiting_.empty()) break;
    if (!busy) wait_for_change(running_.empty() && waiting_.empty());
  }
  const std::lock_guard lock(mutex_);
  ended_ = true;
  happened_.notify_all();
}

bool Scheduler::turn() {
  take_in();
  reap(running_);
  admit();
  std::vector<Span> spans = plan();
  if (spans.empty() || !make_room(spans)) return false;
  step(spans);
  std::erase_if(running_, [](const auto& job) { return job->ended; });
  return true;
}

// Blocks that others hold become free without a word: then it looks again soon.
void Scheduler::wait_for_change(bool idle) {
  std::unique_lock lock(mutex_);
  statistics_.running = static_cast<std::int64_t>(running_.size());
  const auto changed = [&] { return std::exchange(change_, false); };
  if (idle) {
    changed_.wait(lock, changed);
  } else {
    changed_.wait_for(lock, std::chrono::milliseconds(5), changed);
  }
}

void Scheduler::take_in() {
  {
    const std::lock_guard lock(mutex_);
    waiting_.insert(waiting_.end(), arrived_.begin(), arrived_.end());
    arrived_.clear();
    change_ = false;
    statistics_.running = static_cast<std::int64_t>(running_.size());
  }
  for (const auto& job : waiting_) {
    if (closing_ || job->cancelled) end(*job, Finish::cancelled);
  }
  std::erase_if(waiting_, [](const auto& job) { return job->ended; });
}

void Scheduler::reap(Jobs& jobs) {
  for (const auto& job : jobs) {
    if (closing_ || job->cancelled) end(*job, Finish::cancelled);
  }
  std::erase_if(jobs, [](const auto& job) { return job->ended; });
}

void Scheduler::admit() {
  for (std::size_t i = 0; i < waiting_.size() && running_.size() < kMaxRunning;) {
    const std::shared_ptr<Job> job = waiting_[i];
    bool admitted = false;
    try {
      job->sequence = model_->sequence(job->given.mix, job->tokens);
      if (follows(*job, job->sequence->length())) {
        job->sequence = nullptr;
        ++i;
        continue;
      }
      admitted = admit(job);
    } catch (...) {
      end(*job, Finish::error, std::current_exception());
      admitted = true;
    }
    if (!admitted) {  // whoever comes later waits too
      job->sequence = nullptr;
      return;
    }
    waiting_.erase(waiting_.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

// False where the KV cache has no room for it and for the next blocks of those that run.
bool Scheduler::admit(const std::shared_ptr<Job>& job) {
  const std::int64_t found = job->sequence->length();
  if (!job->sequence->try_reserve(job->length())) return false;
  const KvBlocks::Counts blocks = model_->kv().blocks();
  if (!running_.empty() && blocks.free + blocks.idle <= static_cast<std::int64_t>(running_.size()))
    return false;
  const auto place =
      std::ranges::upper_bound(running_, job->number, {}, [](const auto& j) { return j->number; });
  running_.insert(place, job);
  if (std::exchange(job->begun, true)) return true;
  job->cached = found;
  job->queue_s = std::chrono::duration<double>(Clock::now() - job->submitted).count();
  const std::lock_guard lock(mutex_);
  --waiting_count_;
  statistics_.cached_tokens += static_cast<std::uint64_t>(found);
  statistics_.prompt_tokens += static_cast<std::uint64_t>(job->length());
  return true;
}

// Whether more of its prompt than the `found` tokens is being computed for another.
bool Scheduler::follows(const Job& job, std::int64_t found) const {
  if (!job.sequence->shares()) return false;
  return std::ranges::any_of(running_, [&](const auto& other) {
    if (!other->sequence->shares() || other->sequence->root() != job.sequence->root()) return false;
    if (!other->prefills()) return false;
    const std::int64_t same = std::min(common_prefix(other->tokens, job.tokens), job.length() - 1);
    return same / kKvBlockTokens * kKvBlockTokens > found;
  });
}

// A token of everyone who decodes, and of prompts what the step has room for, each its share.
std::vector<Scheduler::Span> Scheduler::plan() const {
  std::vector<Span> spans;
  std::int64_t prompts = 0;
  for (const auto& job : running_) {
    const std::span<const std::int32_t> all(job->tokens);
    if (job->prefills())
      ++prompts;
    else if (job->may_run())
      spans.push_back({job, all.last(static_cast<std::size_t>(job->left())), true});
  }
  if (prompts == 0) return spans;
  const auto decoding = static_cast<std::int64_t>(spans.size());
  const int within = cost_.rows_within(decoding > 0 ? kStreamingStep : kPromptStep);
  std::int64_t room = within == 0 ? kFirstRows : within / kFewestRows * kFewestRows;
  room = std::clamp<std::int64_t>(room, kFewestRows, std::max(kFewestRows, model_->plan().chunk)) - decoding;
  room = std::max<std::int64_t>(room, kFewestRows);
  for (const auto& job : running_) {
    if (!job->prefills()) continue;
    if (room <= 0) break;
    const std::int64_t share =
        std::max<std::int64_t>(room / prompts--, std::min<std::int64_t>(room, kFewestRows));
    std::int64_t count = std::min(share, job->left());
    const bool whole = count == job->left();
    const bool draws = whole && job->may_run();
    if (whole && !draws) --count;  // its last token waits for the word
    const auto from = static_cast<std::size_t>(job->sequence->length());
    spans.push_back(
        {job, std::span<const std::int32_t>(job->tokens).subspan(from, static_cast<std::size_t>(count)),
         draws});
    room -= count;
  }
  return spans;
}

// Room in the KV cache for a step: where there is none the youngest give theirs, and leave the step. False
// where none is left in it.
bool Scheduler::make_room(std::vector<Span>& spans) {
  std::ranges::sort(spans, {}, [](const Span& span) { return span.job->number; });
  for (std::size_t i = 0; i < spans.size();) {
    const std::shared_ptr<Job> job = spans[i].job;
    const std::int64_t needed = job->sequence->length() + static_cast<std::int64_t>(spans[i].tokens.size());
    if (job->sequence->try_reserve(needed)) {
      ++i;
    } else if (!preempt_after(*job, spans)) {
      spans.erase(spans.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }
  return !spans.empty();
}

// The youngest that runs gives its blocks back, unless it is `job`, which then waits.
bool Scheduler::preempt_after(const Job& job, std::vector<Span>& spans) {
  const std::shared_ptr<Job> youngest = running_.back();
  if (youngest.get() == &job) return false;
  running_.pop_back();
  std::erase_if(spans, [&](const Span& span) { return span.job == youngest; });
  youngest->sequence = nullptr;
  const auto place =
      std::ranges::upper_bound(waiting_, youngest->number, {}, [](const auto& j) { return j->number; });
  waiting_.insert(place, youngest);
  const std::lock_guard lock(mutex_);
  ++statistics_.preempted;
  return true;
}

// Where a step fails its rows are run one by one, so that the error finds the one it belongs to.
void Scheduler::step(const std::vector<Span>& spans) {
  try {
    attempt(spans);
  } catch (const Error& error) {
    if (error.kind() == ErrorKind::cancelled) return;  // one of them, or somebody else's step: then again
    if (spans.size() == 1) return end(*spans[0].job, Finish::error, std::current_exception());
    for (const Span& span : spans) step({span});
  } catch (...) {
    if (spans.size() == 1) return end(*spans[0].job, Finish::error, std::current_exception());
    for (const Span& span : spans) step({span});
  }
}

void Scheduler::attempt(const std::vector<Span>& spans) {
  const auto start = Clock::now();
  std::optional<Clock::time_point> patience;  // of those who draw beside others: the step twice as long
  const auto until = [&]() -> const std::optional<Clock::time_point>& {
    if (!patience && spans.size() > 1) patience = Clock::now() + (Clock::now() - start);
    return patience;
  };
  std::vector<SampleRow> rows;
  double count = 0;
  for (const Span& span : spans) {
    SampleRow& row = rows.emplace_back(SampleRow{span.job->sequence.get(), span.tokens});
    if (span.draws) {
      row.sampler = span.job->given.sampler.get();
      row.ready = [&] { return may_draw(*span.job, until()); };
    }
    count += static_cast<double>(span.tokens.size());
  }
  std::vector<std::exception_ptr> errors(spans.size());
  const auto poll = [&] {
    const bool useless = std::ranges::any_of(
        spans, [](const Span& span) { return span.tokens.size() > 1 && span.job->cancelled; });
    if (closing_ || useless) throw Error(ErrorKind::cancelled, "cancelled");
  };
  const std::vector<std::optional<Sample>> samples =
      model_->sample(rows, poll, [&](std::size_t row, std::exception_ptr error) { errors[row] = error; });
  cost_.add(count, std::chrono::duration<double>(Clock::now() - start).count());
  for (std::size_t i = 0; i < spans.size(); ++i) {
    if (errors[i]) {
      end(*spans[i].job, Finish::error, errors[i]);
    } else if (samples[i]) {
      drew(*spans[i].job, *samples[i]);
    } else if (spans[i].draws) {
      put_off(*spans[i].job);
    }
  }
  const std::lock_guard lock(mutex_);
  ++statistics_.steps;
}

// Waits for proceed(), which came while the step ran or is to come soon; `until` then, or for ever.
bool Scheduler::may_draw(const Job& job, const std::optional<Clock::time_point>& until) {
  if (job.may_draw) return true;
  std::unique_lock lock(mutex_);
  const auto told = [&] { return job.may_draw || job.cancelled || closing_; };
  if (until) {
    changed_.wait_until(lock, *until, told);
  } else {
    changed_.wait(lock, told);
  }
  return job.may_draw;
}

// Its token did not come to be drawn: the step leaves it as it was, and it sits out until it may draw.
void Scheduler::put_off(Job& job) {
  job.late = true;
  job.sequence->rewind(job.sequence->length() - 1);
}

void Scheduler::drew(Job& job, Sample sample) {
  job.tokens.push_back(sample.token);
  ++job.drawn;
  job.late = false;
  job.may_draw = !job.given.paced;
  const bool last = std::ranges::find(job.given.ends, sample.token) != job.given.ends.end();
  RequestEvent event{job.number, std::move(sample), Finish::none, nullptr, job.cached, job.queue_s};
  if (last || job.drawn == job.given.max_tokens) event.finish = last ? Finish::stop : Finish::length;
  if (event.finish != Finish::none) {
    job.ended = true;
    job.sequence = nullptr;
  }
  emit(std::move(event));
}

void Scheduler::end(Job& job, Finish finish, std::exception_ptr error) noexcept {
  if (std::exchange(job.ended, true)) return;
  job.sequence = nullptr;
  emit({job.number, std::nullopt, finish, std::move(error), job.cached, job.queue_s});
}

void Scheduler::emit(RequestEvent event) noexcept {
  const std::lock_guard lock(mutex_);
  if (event.finish != Finish::none) {
    const auto found = jobs_.find(event.request);
    if (found != jobs_.end()) {
      if (!found->second->begun) --waiting_count_;
      jobs_.erase(found);
    }
  }
  events_.push_back(std::move(event));
  happened_.notify_all();
}

}  // namespace edgert
