#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "platform/thread.h"
#include "storage/read_queue.h"
#include "storage/reader.h"

namespace edgert {
namespace {

class PreadReader final : public Reader {
 public:
  explicit PreadReader(int depth) : depth_(depth) {
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
    ReadQueue::Reads read = ReadQueue::accept(std::move(request));
    {
      const std::lock_guard lock(mutex_);
      waiting_.push(read, read.begin());
    }
    ready_.notify_one();
  }

  const char* name() const noexcept override { return "pread"; }

  void set_depth(int depth) override {
    {
      const std::lock_guard lock(mutex_);
      depth_ = depth;
    }
    ready_.notify_all();
  }

 private:
  void stop() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    ready_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  void serve() {
    for (;;) {
      ReadQueue::Reads taken;
      std::unique_lock lock(mutex_);
      ready_.wait(lock, [&] { return stopping_ || (!waiting_.empty() && reading_ < depth_); });
      // What a completion submits during destruction is queued by this very thread: it comes back for it.
      if (waiting_.empty()) return;
      QueuedRead& read = *waiting_.pop(taken);
      const bool cancelled = stopping_;
      ++reading_;
      lock.unlock();
      complete(read, cancelled);
      lock.lock();
      --reading_;
    }
  }

  static void complete(QueuedRead& read, bool cancelled) {
    try {
      if (cancelled) {
        read.cancel();
      } else {
        read.request.file->read(read.request.offset, read.request.destination);
      }
    } catch (...) {
      read.failure = std::current_exception();
    }
    read.request.done(read.failure);
  }

  std::mutex mutex_;
  std::condition_variable ready_;
  ReadQueue waiting_;
  int depth_;
  int reading_ = 0;  // or completing
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<Reader> make_pread_reader(int depth) { return std::make_unique<PreadReader>(depth); }

}  // namespace edgert
