#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <numeric>

#include "store_support.h"
#include "support.h"

using namespace edgert;
using test::error_of;
using test::SmallModel;
using test::StoreFixture;
using test::TemporaryDirectory;

namespace {

using R = ExpertStore::Residency;

constexpr int kLayers = 3;
constexpr int kExperts = 10;

// Enough slots that a prefetch may evict, and `slots` of them.
struct Fixture : StoreFixture {
  explicit Fixture(int slots) : StoreFixture(slots, SmallModel{.layers = kLayers, .experts = kExperts}) {}

  std::uint64_t offset(int layer, int expert) const {
    return bundle.manifest()
        .experts[static_cast<std::size_t>(layer)]
        .experts[static_cast<std::size_t>(expert)]
        .extent.offset;
  }
  R residency(int layer, int expert) const {
    return store.residency()[static_cast<std::size_t>(layer)][static_cast<std::size_t>(expert)];
  }
};

std::vector<int> first(int count) {
  std::vector<int> ids(static_cast<std::size_t>(count));
  std::iota(ids.begin(), ids.end(), 0);
  return ids;
}

}  // namespace

TEST_CASE("what was prefetched is there when it is asked for, and counted apart") {
  Fixture f(12);
  f.store.prefetch(1, std::vector{2, 3});
  f.reader.complete_all();
  CHECK(f.store.statistics().prefetched_bytes > 0);
  CHECK(f.take_all(1, {2, 3, 4}) == std::set<int>{2, 3, 4});
  ExpertStatistics s = f.store.statistics();
  CHECK(s.prefetch_hits == 2);
  CHECK(s.hits == 0);
  CHECK(s.misses == 1);
  CHECK(s.prefetched_bytes == 2 * s.demand_bytes);
  f.take_all(1, {2, 3});  // from its first use on it is an expert like any other
  s = f.store.statistics();
  CHECK(s.prefetch_hits == 2);
  CHECK(s.hits == 2);
  CHECK(f.reader.reads == 3);
}

TEST_CASE("two prefetch reads are in flight at most, in the order asked for") {
  Fixture f(12);
  f.store.prefetch(1, std::vector{7, 2, 3, 5});
  CHECK(f.reader.queued() == 2);
  CHECK(f.reader.priority(0) == ReadPriority::prefetch);
  CHECK(f.store.statistics().prefetching == 4);
  CHECK(f.reader.offset(0) == f.offset(1, 7));
  CHECK(f.reader.offset(1) == f.offset(1, 2));
  f.reader.complete_one();
  CHECK(f.reader.queued() == 2);
  CHECK(f.reader.offset(1) == f.offset(1, 3));
  f.reader.complete_all();
  CHECK(f.store.statistics().prefetching == 0);
}

TEST_CASE("a prefetch begins when no demand read is under way") {
  Fixture f(12);
  const auto request = f.store.acquire(0, std::vector{0, 1}, f.cancelled);
  f.store.prefetch(1, std::vector{0});
  CHECK(f.reader.queued() == 2);
  f.reader.complete_one();
  CHECK(f.reader.queued() == 1);
  CHECK(f.reader.priority(0) == ReadPriority::demand);
  f.reader.complete_one();
  CHECK(f.reader.queued() == 1);
  CHECK(f.reader.priority(0) == ReadPriority::prefetch);
  f.reader.complete_all();
}

TEST_CASE("a prefetch takes no slot while a request waits for one") {
  Fixture f(8);
  const auto request = f.store.acquire(0, first(10), f.cancelled);
  f.store.prefetch(1, std::vector{0});
  f.reader.complete_all();
  CHECK(f.reader.reads == 8);
  int taken = 0;
  while (const auto lease = request->next()) {
    ++taken;
    f.reader.complete_all();
    // The leases given back before are the room of the request's last two experts.
    CHECK((f.residency(1, 0) == R::absent) == (taken < 4));
  }
  CHECK(taken == 10);
}

TEST_CASE("an expert that is wanted while it is prefetched is waited for, not read twice") {
  Fixture f(12);
  f.store.prefetch(1, std::vector{0, 1, 2});
  const auto request = f.store.acquire(1, std::vector{0, 4}, f.cancelled);
  CHECK(f.reader.queued() == 3);  // 0 and 1 ahead of need, 4 on demand
  f.reader.complete_one();
  CHECK(request->next()->expert() == 0);
  CHECK(f.reader.queued() == 2);
  f.reader.complete_all();
  CHECK(request->next()->expert() == 4);
  CHECK_FALSE(request->next().has_value());
  const ExpertStatistics s = f.store.statistics();
  CHECK(s.misses == 2);
  CHECK(s.prefetch_hits == 0);
  CHECK(f.reader.reads == 3);  // 2 was dropped when its layer came without it
}

TEST_CASE("a prefetch that is wanted and fails is read again for the one who wants it") {
  Fixture f(12);
  f.store.prefetch(1, std::vector{0});
  const auto request = f.store.acquire(1, std::vector{0}, f.cancelled);
  f.reader.fail = 1;
  f.reader.complete_one();
  CHECK_FALSE(request->next_ready().has_value());
  CHECK(f.reader.priority(0) == ReadPriority::demand);
  SUBCASE("which succeeds") {
    f.reader.complete_one();
    CHECK(request->next()->expert() == 0);
  }
  SUBCASE("which fails too") {
    f.reader.fail = 1;
    f.reader.complete_one();
    CHECK(error_of(ErrorKind::io, [&] { request->next(); }) == "the disk is gone");
  }
}

TEST_CASE("a failure stops the prefetch, and nobody hears of it") {
  Fixture f(12);
  SUBCASE("of a read") { f.reader.fail = 1; }
  SUBCASE("of damaged bytes") { f.reader.spoil = 3; }
  SUBCASE("to submit") { f.reader.refuse = 2; }
  f.store.prefetch(1, std::vector{0, 1, 2, 3});
  f.reader.complete_all();
  const ExpertStatistics s = f.store.statistics();
  CHECK(s.prefetching == 0);
  CHECK(s.resident < 4);
  CHECK(s.slot_bytes == s.resident * f.slot);
  CHECK(f.take_all(1, {0, 1, 2, 3}).size() == 4);
}

TEST_CASE("a prefetch evicts the least recently used, but nothing that is leased or asked for with it") {
  Fixture f(8);
  f.take_all(0, {0, 1});
  f.take_all(1, {8, 9});
  f.take_all(0, {2, 3, 4, 5});
  const auto request = f.store.acquire(0, std::vector{0, 5}, f.cancelled);
  const auto lease = request->next();
  f.store.prefetch(1, first(10));
  f.reader.complete_all();
  CHECK(f.residency(0, 0) == R::resident);
  CHECK(f.residency(0, 5) == R::resident);
  CHECK(f.residency(1, 8) == R::resident);
  CHECK(f.residency(1, 9) == R::resident);
  for (const int gone : {1, 2, 3, 4}) CHECK(f.residency(0, gone) == R::absent);
  for (const int ahead : {0, 1, 2, 3}) CHECK(f.residency(1, ahead) == R::resident);
  CHECK(f.residency(1, 4) == R::absent);
  CHECK(f.store.statistics().slot_bytes == 8 * f.slot);
  f.store.cancel_prefetch();
}

TEST_CASE("where slots are few a prefetch evicts nothing") {
  Fixture f(7);
  f.take_all(0, {0, 1, 2, 3, 4, 5});
  f.store.prefetch(1, std::vector{0, 1});
  f.reader.complete_all();
  CHECK(f.residency(1, 0) == R::resident);  // there was room
  CHECK(f.residency(1, 1) == R::absent);
  CHECK(f.store.statistics().evictions == 0);
}

TEST_CASE("a later prefetch takes the place of an earlier one, and can be cancelled") {
  Fixture f(12);
  f.store.prefetch(1, first(10));
  f.store.prefetch(2, std::vector{4});
  f.reader.complete_all();
  CHECK(f.reader.reads == 3);  // two had begun
  CHECK(f.residency(2, 4) == R::resident);
  f.store.prefetch(2, first(10));
  f.store.cancel_prefetch();
  f.reader.complete_all();
  CHECK(f.reader.reads == 5);
  error_of(ErrorKind::invalid_argument, [&] { f.store.prefetch(0, std::vector{10}); });
  error_of(ErrorKind::invalid_argument, [&] { f.store.prefetch(kLayers, {}); });
}

TEST_CASE("a layer prefetched with certainty is read as often as without") {
  // Layer after layer, every expert: the scan that LRU answers worst.
  for (const int slots : {2, 7, 8, 11, 15, 19, 20, 25, 29, 30}) {
    Fixture plain(slots);
    Fixture ahead(slots);
    for (int step = 0; step < 4; ++step) {
      for (int layer = 0; layer < kLayers; ++layer) {
        plain.take_all(layer, first(kExperts));
        const auto request = ahead.store.acquire(layer, first(kExperts), ahead.cancelled);
        ahead.store.prefetch((layer + 1) % kLayers, first(kExperts));
        while (ahead.reader.complete_all(), request->next()) {
        }
      }
    }
    ahead.store.cancel_prefetch();
    ahead.take_all(0, first(kExperts));
    plain.take_all(0, first(kExperts));
    CAPTURE(slots);
    CHECK(ahead.reader.reads <= plain.reader.reads);
    const ExpertStatistics s = ahead.store.statistics();
    CHECK(s.slot_bytes <= static_cast<std::uint64_t>(slots) * ahead.slot);
    CHECK((slots < 12 || s.prefetch_hits > 0));
  }
}

TEST_CASE("steps that use every expert leave what is there for the next of them") {
  constexpr int kAll = kLayers * kExperts;
  for (const int slots : {kExperts + 2, 2 * kExperts, kAll - 1}) {
    CAPTURE(slots);
    Fixture f(slots);
    const auto scan = [&] {
      const int before = f.reader.reads;
      for (int layer = 0; layer < kLayers; ++layer) f.take_all(layer, first(kExperts));
      return f.reader.reads - before;
    };
    CHECK(scan() == kAll);
    // At most a layer's worth of slots is needed in passing; what the others hold stays.
    for (int step = 0; step < 3; ++step) CHECK(scan() <= kAll - (slots - kExperts));
  }
}

TEST_CASE("what a step uses in passing goes before what single tokens used") {
  Fixture f(kExperts + 2);
  f.take_all(0, {3, 7});
  for (int layer = 1; layer < kLayers; ++layer) f.take_all(layer, first(kExperts));
  CHECK(f.residency(0, 3) == R::resident);
  CHECK(f.residency(0, 7) == R::resident);
}

TEST_CASE("filling reads what is not there, once, in the order of the files") {
  Fixture f(kLayers * kExperts);
  f.take_all(1, {3, 4});
  f.store.fill();
  std::vector<std::uint64_t> offsets;
  while (f.reader.queued() > 0) {
    CHECK(f.reader.queued() <= 2);
    CHECK(f.reader.priority(0) == ReadPriority::prefetch);
    offsets.push_back(f.reader.offset(0));
    f.reader.complete_one();
  }
  CHECK(std::is_sorted(offsets.begin(), offsets.end()));
  const ExpertStatistics s = f.store.statistics();
  CHECK(s.resident == kLayers * kExperts);
  CHECK(s.prefetching == 0);
  CHECK(s.evictions == 0);
  CHECK(f.reader.reads == kLayers * kExperts);
  f.take_all(1, first(kExperts));
  CHECK(f.store.statistics().prefetch_hits == kExperts - 2);
  CHECK(f.store.statistics().hits == 2);
}

TEST_CASE("filling stops where room ends, makes way for demand, and comes after what is asked for ahead") {
  Fixture f(6);
  f.store.fill();
  f.store.prefetch(2, std::vector{9});
  const auto request = f.store.acquire(0, std::vector{8}, f.cancelled);
  CHECK(f.reader.queued() == 3);
  f.reader.complete_one();
  f.reader.complete_one();
  CHECK(f.reader.queued() == 1);
  CHECK(f.reader.offset(0) == f.offset(0, 8));
  f.reader.complete_one();
  CHECK(f.reader.offset(0) == f.offset(2, 9));
  CHECK(f.reader.offset(1) == f.offset(0, 2));
  f.reader.complete_all();
  const ExpertStatistics s = f.store.statistics();
  CHECK(s.resident == 6);
  CHECK(s.evictions == 0);
  CHECK(s.prefetching == 0);
}

TEST_CASE("a store that is filling can be destroyed, before its reader and after") {
  const TemporaryDirectory directory;
  const Bundle bundle = Bundle::open(test::write_small_bundle(directory.path(), {}), DirectIo::off);
  const auto budget = std::make_shared<Budget>(1 << 30);
  for (const bool reader_first : {false, true}) {
    auto reader = make_pread_reader(1);
    ExpertStore store(bundle, budget, *reader, 1 << 20, Eviction::lru);
    store.fill();
    if (reader_first) reader.reset();
  }
  CHECK(budget->used_bytes() == 0);
}

TEST_CASE("a forked process lets go of a store without waiting for reads that are not its own") {
  auto f = std::make_unique<Fixture>(12);
  f->store.fill();
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // rather than for ever
    f->store.~ExpertStore();
    _exit(7);
  }
  int status = 0;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status));
  f->reader.complete_all();
  CHECK(f->store.statistics().resident == 12);
}
