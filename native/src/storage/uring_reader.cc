// Reads in flight in the kernel instead of in threads.
//
// One thread owns the ring: it alone submits and takes results out, and does nothing that takes long. So the
// next read is under way at once when one is done, whatever completions do, and the kernel, which delivers
// results in the thread that submitted, never has to interrupt a thread that computes or to wait for one that
// was displaced. It is not the caller that submits either: a read of some MB takes the kernel 0.1 ms to set
// up, and a caller holds its locks meanwhile.
//
// Completions run on two more threads. What they do is mostly a checksum, which one core computes several
// times faster than a disk delivers; the second is there for when the first was displaced by a thread that
// computes. More would only compete for the cores.
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "platform/error.h"
#include "platform/thread.h"
#include "storage/read_queue.h"
#include "storage/reader.h"
#include "storage/uring.h"

namespace edgert {
namespace {

class UringReader final : public Reader {
 public:
  explicit UringReader(int depth)
      : depth_(static_cast<std::size_t>(depth)),
        completers_(std::min<std::size_t>(depth_, 2)),
        ring_(static_cast<unsigned>(depth)) {
    try {
      ring_thread_ = start_thread("edgert-ring", [this] { serve_ring(); });
      for (std::size_t i = 0; i < completers_; ++i) {
        threads_.push_back(start_thread("edgert-read-" + std::to_string(i), [this] { serve_completions(); }));
      }
    } catch (...) {
      stop();
      throw;
    }
  }

  ~UringReader() override { stop(); }

  void submit(ReadRequest request) override {
    ReadQueue::Reads read = ReadQueue::accept(std::move(request));
    const std::lock_guard lock(mutex_);
    if (stopping_) {  // by a completion, whose own thread comes back for it
      read.front().cancel();
      finished_.push(read, read.begin());
      return;
    }
    waiting_.push(read, read.begin());
    wake_ring();
  }

  const char* name() const noexcept override { return "io_uring"; }

  void set_depth(int depth) override {
    const std::lock_guard lock(mutex_);
    depth_ = static_cast<std::size_t>(depth);
    wake_ring();
  }

 private:
  void stop() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
      ReadQueue::Reads cancelled;
      while (!waiting_.empty()) {
        const auto read = waiting_.pop(cancelled);
        read->cancel();
        finished_.push(cancelled, read);
      }
    }
    ready_.notify_all();
    ring_.interrupt();
    if (ring_thread_.joinable()) ring_thread_.join();  // else it did not start
    for (auto& thread : threads_) thread.join();
  }

  // --- with the lock held -------------------------------------------------------------------------------

  // A read that is done and not completed takes a place beside those in flight, so that a demand read never
  // finds many prefetched ones ahead of it.
  bool may_begin() const noexcept {
    return !waiting_.empty() && reading_.size() < depth_ &&
           reading_.size() + finished_.size() + completing_ < depth_ + completers_;
  }

  void wake_ring() noexcept {
    if (!ring_waits_ || !may_begin()) return;
    ring_waits_ = false;
    ring_.interrupt();
  }

  void finish(ReadQueue::Reads::iterator read) noexcept {
    finished_.push(reading_, read);
    ++unannounced_;
  }

  // --- the ring's thread, with the lock held ------------------------------------------------------------

  void begin_next() noexcept {
    const auto read = waiting_.pop(reading_);
    const ReadRequest& request = read->request;
    try {
      read->steps.emplace(*request.file, request.offset, request.destination);
      // What comes through the page cache is copied: by threads of the kernel, else all of it by this one.
      read->may_wait = !request.file->direct();
      go_on(read);
    } catch (...) {
      read->failure = std::current_exception();
      finish(read);
    }
  }

  void go_on(ReadQueue::Reads::iterator read) {
    if (read->steps->complete()) return finish(read);
    const auto [destination, offset] = read->steps->next();
    ring_.push(read->request.file->descriptor(), destination, static_cast<std::uint64_t>(offset),
               read->may_wait ? Uring::Begin::by_kernel_thread : Uring::Begin::in_place,
               reinterpret_cast<std::uintptr_t>(&*read));
  }

  void take(const Uring::Result& result) noexcept {
    const auto read = std::find_if(reading_.begin(), reading_.end(), [&](const QueuedRead& r) {
      return reinterpret_cast<std::uintptr_t>(&r) == result.tag;
    });
    try {
      if ((result.value == -EAGAIN || result.value == -ENOMEM) && !read->may_wait) {
        read->may_wait = true;
      } else {
        read->steps->advance(result.value);
      }
      go_on(read);
    } catch (...) {
      read->failure = std::current_exception();
      finish(read);
    }
  }

  // The kernel refuses to take reads, for instance because the process has been sandboxed since.
  void fail_unsubmitted(int error) noexcept {
    while (const auto tag = ring_.take_back()) take({*tag, -error});
  }

  void serve_ring() {
    std::unique_lock lock(mutex_);
    for (;;) {
      if (stopping_ && reading_.empty()) break;
      while (may_begin()) begin_next();
      const int finished = std::exchange(unannounced_, 0);
      ring_waits_ = true;
      lock.unlock();
      for (int i = 0; i < finished; ++i) ready_.notify_one();
      const int error = ring_.submit_and_wait();
      const bool short_of_memory = error == EAGAIN || error == EBUSY || error == ENOMEM;
      if (error != 0 && error != EINTR) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      lock.lock();
      ring_waits_ = false;
      if (error != 0 && error != EINTR && !short_of_memory) fail_unsubmitted(error);
      while (const auto result = ring_.pop()) take(*result);
    }
    ring_closed_ = true;
    ready_.notify_all();
  }

  // --- the threads of completions -------------------------------------------------------------------------

  void serve_completions() {
    std::unique_lock lock(mutex_);
    for (;;) {
      ready_.wait(lock, [&] { return ring_closed_ || !finished_.empty(); });
      if (finished_.empty()) return;
      ReadQueue::Reads taken;
      QueuedRead& read = *finished_.pop(taken);
      ++completing_;
      lock.unlock();
      if (!read.failure) read.steps->drop_cached();
      read.request.done(read.failure);
      taken.clear();
      lock.lock();
      --completing_;
      wake_ring();
    }
  }

  std::size_t depth_;
  const std::size_t completers_;
  Uring ring_;

  std::mutex mutex_;
  std::condition_variable ready_;
  ReadQueue waiting_;
  ReadQueue::Reads reading_;  // in the kernel
  ReadQueue finished_;
  int unannounced_ = 0;  // of those, and no thread has been woken for them
  std::size_t completing_ = 0;
  bool ring_waits_ = false;  // or is about to
  bool stopping_ = false;
  bool ring_closed_ = false;
  std::thread ring_thread_;
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<Reader> make_uring_reader(int depth) { return std::make_unique<UringReader>(depth); }

}  // namespace edgert
