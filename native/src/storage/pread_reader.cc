#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "platform/error.h"
#include "platform/thread.h"
#include "storage/reader.h"

namespace edgert {
namespace {

class PreadReader final : public Reader {
 public:
  explicit PreadReader(int depth) {
    try {
      for (int i = 0; i < depth; ++i) {
        threads_.push_back(start_thread("edgert-read-" + std::to_string(i), [this] { serve(); }));
      }
    } catch (...) {
      stop();
      throw;
    }
  }

  ~PreadReader() override { stop(); }

  void submit(ReadRequest request) override {
    if (!request.file || !request.done) {
      throw Error(ErrorKind::invalid_argument, "a read needs a file and a completion");
    }
    {
      std::lock_guard lock(mutex_);
      (request.priority == ReadPriority::demand ? demand_ : prefetch_).push_back(std::move(request));
    }
    ready_.notify_one();
  }

  const char* name() const noexcept override { return "pread"; }

 private:
  void stop() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    ready_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  void serve() {
    for (;;) {
      std::unique_lock lock(mutex_);
      ready_.wait(lock, [&] { return stopping_ || !demand_.empty() || !prefetch_.empty(); });
      auto& queue = demand_.empty() ? prefetch_ : demand_;
      // What a completion submits during destruction is queued by this very thread: it comes back for it.
      if (queue.empty()) return;
      ReadRequest request = std::move(queue.front());
      queue.pop_front();
      const bool cancelled = stopping_;
      lock.unlock();
      complete(std::move(request), cancelled);
    }
  }

  static void complete(ReadRequest request, bool cancelled) {
    std::exception_ptr failure;
    try {
      if (cancelled) {
        throw Error(ErrorKind::cancelled, request.file->path().string() + ": offset " +
                                              std::to_string(request.offset) + ": the reader closed first");
      }
      request.file->read(request.offset, request.destination);
    } catch (...) {
      failure = std::current_exception();
    }
    request.done(failure);
  }

  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<ReadRequest> demand_;
  std::deque<ReadRequest> prefetch_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<Reader> make_pread_reader(int depth) {
  if (depth < 1 || depth > 256) {
    throw Error(ErrorKind::invalid_argument, "I/O threads: " + std::to_string(depth) + " is not in 1 to 256");
  }
  return std::make_unique<PreadReader>(depth);
}

}  // namespace edgert
