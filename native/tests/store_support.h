// A store over a small bundle whose reads a test carries out one by one.
#pragma once

#include <deque>
#include <set>
#include <vector>

#include "experts/store.h"
#include "small_bundle.h"
#include "support.h"

namespace edgert::test {

// Carries reads out when told to, and can spoil them.
class ManualReader final : public Reader {
 public:
  void submit(ReadRequest request) override {
    if (refuse > 0 && --refuse == 0) throw Error(ErrorKind::io, "no room in the queue");
    queue_.push_back(std::move(request));
  }
  const char* name() const noexcept override { return "manual"; }
  std::size_t queued() const { return queue_.size(); }
  ReadPriority priority(std::size_t i) const { return queue_[i].priority; }
  std::uint64_t offset(std::size_t i) const { return queue_[i].offset; }
  void run_one() {
    ReadRequest request = std::move(queue_.front());
    queue_.pop_front();
    request.file->read(request.offset, request.destination);
    ++reads;
    if (spoil > 0) {
      --spoil;
      request.destination[5] ^= std::byte{1};
    }
    std::exception_ptr error;
    if (fail > 0) {
      --fail;
      error = std::make_exception_ptr(Error(ErrorKind::io, "the disk is gone"));
    }
    pending_.push_back([done = std::move(request.done), error] { done(error); });
  }
  // Completions run outside submit(), as they do on a reader's threads.
  void complete_one() {
    if (pending_.empty()) run_one();
    auto done = std::move(pending_.front());
    pending_.pop_front();
    done();
  }
  void complete_all() {
    while (!pending_.empty() || !queue_.empty()) complete_one();
  }
  int spoil = 0;
  int fail = 0;
  int refuse = 0;  // the submission that is refused, counted from now; 0: none
  int reads = 0;

 private:
  std::deque<ReadRequest> queue_;
  std::deque<std::function<void()>> pending_;
};

struct StoreFixture {
  explicit StoreFixture(int slots, SmallModel model = {}, Eviction eviction = Eviction::lru)
      : bundle(Bundle::open(test::write_small_bundle(directory.path(), model), DirectIo::off)),
        slot(ExpertStore::slot_bytes(bundle.manifest().experts[0].experts[0])),
        store(bundle, budget, reader, slot * static_cast<std::uint64_t>(slots), eviction) {}

  // Takes every lease of a layer's set, completing reads as the step would find them done.
  std::set<int> take_all(int layer, const std::vector<int>& experts) {
    const auto request = store.acquire(layer, experts, cancelled);
    std::set<int> seen;
    while (true) {
      reader.complete_all();
      const auto lease = request->next();
      if (!lease) return seen;
      CHECK(seen.insert(lease->expert()).second);
    }
  }

  TemporaryDirectory directory;
  Bundle bundle;
  std::shared_ptr<Budget> budget = std::make_shared<Budget>(1 << 30);
  ManualReader reader;
  std::atomic<bool> cancelled{false};
  std::uint64_t slot;
  ExpertStore store;
};

}  // namespace edgert::test
