#include "experts/store.h"

#include <cstring>

#include "store_support.h"
#include "support.h"

using namespace edgert;
using test::contains;
using test::error_of;
using test::SmallModel;
using test::TemporaryDirectory;
using Fixture = test::StoreFixture;

TEST_CASE("a set larger than the slots goes through, each expert once") {
  Fixture f(2);
  CHECK(f.take_all(0, {0, 1, 2, 3, 4, 5}) == std::set<int>{0, 1, 2, 3, 4, 5});
  const ExpertStatistics s = f.store.statistics();
  CHECK(s.misses == 6);
  CHECK(s.hits == 0);
  CHECK(s.resident == 2);
  CHECK(s.slot_bytes == 2 * f.slot);
  CHECK(f.reader.reads == 6);
}

TEST_CASE("what is resident comes without a read, and first") {
  Fixture f(4);
  f.take_all(1, {2, 4});
  const auto request = f.store.acquire(1, std::vector{1, 2, 4}, f.cancelled);
  CHECK(f.reader.queued() == 1);
  CHECK(request->next()->expert() == 2);
  CHECK(request->next()->expert() == 4);
  f.reader.complete_all();
  CHECK(request->next()->expert() == 1);
  CHECK_FALSE(request->next().has_value());
  CHECK(f.store.statistics().hits == 2);
}

TEST_CASE("what is ready can be taken together, without waiting for the rest") {
  Fixture f(4);
  f.take_all(1, {2, 4});
  const auto request = f.store.acquire(1, std::vector{1, 2, 4}, f.cancelled);
  const auto first = request->next();
  const auto second = request->next_ready();
  CHECK(first->expert() == 2);
  CHECK(second->expert() == 4);
  CHECK_FALSE(request->next_ready().has_value());
  f.reader.complete_all();
  CHECK(request->next_ready()->expert() == 1);
}

TEST_CASE("the least recently used expert goes") {
  Fixture f(3);
  f.take_all(0, {0, 1, 2});
  f.take_all(0, {0});
  f.take_all(0, {3});
  const auto residency = f.store.residency()[0];
  using R = ExpertStore::Residency;
  CHECK(residency == std::vector{R::resident, R::absent, R::resident, R::resident, R::absent, R::absent});
}

TEST_CASE("a lease shows the bytes of its expert") {
  Fixture f(2);
  const auto request = f.store.acquire(2, std::vector{3}, f.cancelled);
  f.reader.complete_all();
  const auto lease = request->next();
  const Extent& extent = f.bundle.manifest().experts[2].experts[3].extent;
  Buffer expected(nullptr, extent.bytes, "expected");
  f.bundle.file(extent.file)->read(extent.offset, expected.span());
  CHECK(std::memcmp(lease->data(), expected.data(), extent.bytes) == 0);
}

TEST_CASE("damaged bytes are read once more before they count") {
  Fixture f(2);
  f.reader.spoil = 1;
  CHECK(f.take_all(0, {0}) == std::set<int>{0});
  CHECK(f.reader.reads == 2);
}

TEST_CASE("bytes damaged twice fail the request that asked, and no other") {
  Fixture f(2);
  f.reader.spoil = 2;
  const std::string message = error_of(ErrorKind::corrupt, [&] { f.take_all(0, {4}); });
  CHECK(contains(message, "expert 4 of layer 0"));
  CHECK(contains(message, "experts-00000.bin"));
  CHECK(f.store.statistics().slot_bytes == 0);
  CHECK(f.take_all(0, {3, 4}) == std::set<int>{3, 4});
}

TEST_CASE("a failed read is reported, and the slot comes back") {
  Fixture f(2);
  f.reader.fail = 1;
  CHECK(error_of(ErrorKind::io, [&] { f.take_all(0, {0, 1}); }) == "the disk is gone");
  CHECK(f.take_all(0, {0, 1, 2}) == std::set<int>{0, 1, 2});
  CHECK(f.store.statistics().slot_bytes == 2 * f.slot);
}

TEST_CASE("a read that the reader does not take is reported, and can be asked for again") {
  Fixture f(2);
  f.reader.refuse = 1;
  error_of(ErrorKind::io, [&] { f.store.acquire(0, std::vector{0, 1}, f.cancelled); });
  CHECK(f.store.statistics().slot_bytes == 0);
  CHECK(f.take_all(0, {0, 1, 2}) == std::set<int>{0, 1, 2});
  f.reader.spoil = 1;
  f.reader.refuse = 2;  // the second reading of damaged bytes
  error_of(ErrorKind::io, [&] { f.take_all(0, {3}); });
  CHECK(f.take_all(0, {3}) == std::set<int>{3});
}

TEST_CASE("the capacity is charged from the beginning, and given back") {
  const auto budget = std::make_shared<Budget>(1 << 20);
  {
    Fixture f(2);
    const ExpertStore store(f.bundle, budget, f.reader, 2 * f.slot, Eviction::lru);
    CHECK(budget->used_bytes() == 2 * f.slot + ExpertStore::index_bytes(Eviction::lru, std::vector{6, 6, 6}));
    CHECK(contains(
        error_of(ErrorKind::budget, [&] { ExpertStore(f.bundle, budget, f.reader, 1 << 20, Eviction::lru); }),
        "expert slots"));
  }
  CHECK(budget->used_bytes() == 0);
}

TEST_CASE("a request that is given up returns its pins") {
  Fixture f(2);
  f.take_all(0, {0, 1});
  {
    const auto abandoned = f.store.acquire(0, std::vector{0, 1}, f.cancelled);
  }
  CHECK(f.take_all(0, {2, 3}) == std::set<int>{2, 3});
}

TEST_CASE("waiting stops when cancelled") {
  Fixture f(2);
  const auto request = f.store.acquire(0, std::vector{0}, f.cancelled);
  f.cancelled = true;
  CHECK(contains(error_of(ErrorKind::cancelled, [&] { request->next(); }), "cancelled"));
  f.reader.complete_all();
}

TEST_CASE("experts of different formats are charged what they weigh") {
  SmallModel model;
  model.expert_formats = {"int8", "int2"};
  model.hidden = 256;
  model.intermediate = 256;
  Fixture f(2, model);
  f.take_all(0, {0, 2});
  CHECK(f.store.statistics().slot_bytes == 2 * f.slot);
  f.take_all(0, {1, 3, 5});  // light ones in the place of a heavy one
  const std::uint64_t light = ExpertStore::slot_bytes(f.bundle.manifest().experts[0].experts[1]);
  const ExpertStatistics s = f.store.statistics();
  CHECK(s.slot_bytes <= 2 * f.slot);
  CHECK(s.slot_bytes >= 3 * light);
}

TEST_CASE("the page-in hook sees an expert before it is published") {
  Fixture f(2);
  const auto change = std::make_shared<int>(7);
  f.store.set_page_in_hook([&](const ExpertStore::Expert& expert, std::span<std::byte> bytes) {
    CHECK(expert.layer == 1);
    CHECK(expert.expert == 5);
    bytes[0] = std::byte{42};
    return change;
  });
  const auto request = f.store.acquire(1, std::vector{5}, f.cancelled);
  f.reader.complete_all();
  const auto lease = request->next();
  CHECK(lease->data()[0] == std::byte{42});
  CHECK(lease->change() == change);
}

TEST_CASE("a read that another request began and that failed is tried again, not inherited") {
  // Holds the first read back and then fails it; the rest are real.
  class FlakyReader final : public Reader {
   public:
    void submit(ReadRequest request) override {
      if (held_) return real_->submit(std::move(request));
      held_ = std::move(request);
    }
    const char* name() const noexcept override { return "flaky"; }
    void fail_held() { held_->done(std::make_exception_ptr(Error(ErrorKind::io, "an old failure"))); }

   private:
    std::unique_ptr<Reader> real_ = make_pread_reader(1);
    std::optional<ReadRequest> held_;
  };
  const TemporaryDirectory directory;
  const Bundle bundle = Bundle::open(test::write_small_bundle(directory.path(), {}), DirectIo::off);
  FlakyReader reader;
  const std::uint64_t slot = ExpertStore::slot_bytes(bundle.manifest().experts[0].experts[0]);
  ExpertStore store(bundle, std::make_shared<Budget>(1 << 30), reader, 2 * slot, Eviction::lru);
  const std::atomic<bool> cancelled{false};
  {
    const auto abandoned = store.acquire(0, std::vector{0}, cancelled);
  }
  const auto request = store.acquire(0, std::vector{0}, cancelled);
  reader.fail_held();
  CHECK(request->next()->expert() == 0);
}
