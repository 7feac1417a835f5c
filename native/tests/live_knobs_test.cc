// Knobs that change while steps run: results stay the same bits, memory follows, nothing waits for ever.
#include <atomic>
#include <map>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "engine/model.h"
#include "model_support.h"
#include "platform/thread_pool.h"
#include "store_support.h"

using namespace edgert;
using test::all_logits;
using test::contains;
using test::error_of;
using test::make_runtime;
using test::SmallModel;
using test::some_tokens;
using test::StoreFixture;
using test::TemporaryDirectory;

TEST_CASE("a smaller store evicts at once what nobody holds, and gives its charge back") {
  StoreFixture f(5);
  f.take_all(0, {0, 1, 2, 3, 4});
  const std::uint64_t before = f.budget->used_bytes();
  f.store.resize(2 * f.slot);
  CHECK(f.store.statistics().resident == 2);
  CHECK(f.store.statistics().slot_bytes == 2 * f.slot);
  CHECK(f.store.statistics().capacity_bytes == 2 * f.slot);
  CHECK(f.budget->used_bytes() == before - 3 * f.slot);
  CHECK(f.take_all(0, {0, 1, 2, 3, 4}) == std::set{0, 1, 2, 3, 4});  // through the two that are left
}

TEST_CASE("what stays in a smaller store moves together, and keeps its bytes") {
  StoreFixture f(6);
  f.take_all(0, {0, 1, 2, 3, 4, 5});
  std::map<int, std::vector<std::byte>> bytes;
  const auto places = [&](const std::vector<int>& experts) {
    std::set<const std::byte*> found;
    const auto request = f.store.acquire(0, experts, f.cancelled);
    while (auto lease = request->next_ready()) {
      found.insert(lease->data());
      std::vector<std::byte> read(lease->data(), lease->data() + f.slot);
      const auto& known = bytes.try_emplace(lease->expert(), read).first->second;
      CHECK(read == known);
    }
    return found;
  };
  const auto before = places({0, 1, 2, 3, 4, 5});
  places({3, 5});  // used last: they stay
  f.store.resize(2 * f.slot);
  CHECK(places({3, 5}) == std::set(before.begin(), std::next(before.begin(), 2)));
}

TEST_CASE("what is leased outlives a smaller capacity, and goes when it is given back") {
  StoreFixture f(4);
  f.take_all(0, {0, 1, 2, 3});
  const std::uint64_t before = f.budget->used_bytes();
  {
    const auto request = f.store.acquire(0, std::vector{0, 1, 2, 3}, f.cancelled);
    std::vector<ExpertStore::Lease> leases;
    while (auto lease = request->next_ready()) leases.push_back(std::move(*lease));
    CHECK(leases.size() == 4);
    f.store.resize(2 * f.slot);
    CHECK(f.store.statistics().slot_bytes == 4 * f.slot);
    CHECK(f.budget->used_bytes() == before);  // still taken, so still charged
    leases.pop_back();
    CHECK(f.store.statistics().slot_bytes == 3 * f.slot);
  }
  CHECK(f.store.statistics().slot_bytes == 2 * f.slot);
  CHECK(f.budget->used_bytes() == before - 2 * f.slot);
}

TEST_CASE("a larger store charges the budget first, and has places for what it may hold then") {
  StoreFixture f(2);
  f.take_all(0, {0, 1});
  const std::uint64_t before = f.budget->used_bytes();
  f.store.resize(4 * f.slot);
  CHECK(f.budget->used_bytes() == before + 2 * f.slot);
  f.take_all(0, {0, 1, 2, 3});
  CHECK(f.store.statistics().resident == 4);
  CHECK(f.store.statistics().evictions == 0);
  f.budget->set_limit(before);
  CHECK(contains(error_of(ErrorKind::budget, [&] { f.store.resize(5 * f.slot); }), "memory budget"));
  CHECK(f.store.statistics().capacity_bytes == 4 * f.slot);
  CHECK(contains(error_of(ErrorKind::budget, [&] { f.store.resize(f.slot); }),
                 std::to_string(2 * f.slot)));  // the least
}

TEST_CASE("a store that held everything evicts by its policy once it is made smaller") {
  SmallModel small;
  StoreFixture f(small.layers * small.experts, small, Eviction::lfu);
  for (int layer = 0; layer < small.layers; ++layer) {
    std::vector<int> all;
    for (int e = 0; e < small.experts; ++e) all.push_back(e);
    f.take_all(layer, all);
  }
  f.store.resize(4 * f.slot);
  for (int i = 0; i < 3; ++i) f.take_all(0, {0, 1});  // often
  f.take_all(0, {2});
  f.take_all(0, {3});
  f.take_all(0, {4});
  const auto residency = f.store.residency()[0];
  CHECK(residency[0] == ExpertStore::Residency::resident);
  CHECK(residency[1] == ExpertStore::Residency::resident);
}

TEST_CASE("no read begins ahead of need at a prefetch depth of 0; those asked for begin when it is raised") {
  StoreFixture f(16);
  f.store.set_prefetch_depth(0);
  f.store.prefetch(0, std::vector{0, 1, 2});
  CHECK(f.reader.queued() == 0);
  f.store.set_prefetch_depth(3);
  CHECK(f.reader.queued() == 3);
  f.reader.complete_all();
}

TEST_CASE("a pool runs every index once, however many of its threads take part meanwhile") {
  ThreadPool pool(4);
  std::atomic<bool> over{false};
  std::thread changes([&] {
    for (int i = 0; !over; ++i) pool.set_active(1 + i % 4);
  });
  for (int round = 0; round < 2000; ++round) {
    std::vector<std::atomic<int>> seen(37);
    pool.run(37, round % 3, [&](int begin, int end, int) {
      for (int i = begin; i < end; ++i) ++seen[static_cast<std::size_t>(i)];
    });
    for (const auto& count : seen) REQUIRE(count == 1);
  }
  over = true;
  changes.join();
  pool.set_active(1);
  pool.run(8, 1, [](int, int, int worker) { CHECK(worker == 0); });
  CHECK(contains(error_of(ErrorKind::invalid_argument, [&] { pool.set_active(5); }), "allowed 1 to 4"));
}

TEST_CASE("logits are the same bits while every knob changes at random under several sequences") {
  const TemporaryDirectory directory;
  const SmallModel small;
  const auto path = test::write_small_bundle(directory.path(), small);
  const auto tokens = some_tokens(24, small.vocab);
  const auto runtime = make_runtime(1 << 30, 3);
  ModelOptions options;
  options.parallel = 3;
  Model model(runtime, path, options);
  const std::uint64_t budget = runtime->budget()->limit_bytes();
  const std::vector<float> expected = all_logits(model, tokens);

  std::atomic<int> at_work{3};
  std::atomic<int> wrong{0};
  const auto serve = [&] {
    for (int round = 0; round < 12; ++round) {
      const auto sequence = model.sequence();
      std::vector<float> logits;
      for (const std::int32_t token : tokens) {
        const StepRow row{sequence.get(), std::span(&token, 1), Wanted::all};
        model.step(std::span(&row, 1),
                   [&](std::size_t, std::size_t, std::span<float> l) {
                     logits.insert(logits.end(), l.begin(), l.end());
                   },
                   {});
      }
      if (logits != expected) ++wrong;
    }
    --at_work;
  };
  std::vector<std::thread> servers;
  for (int i = 0; i < 3; ++i) servers.emplace_back(serve);
  std::mt19937 draw(7);
  const std::uint64_t least = model.least_expert_bytes(), most = model.plan().expert_bytes;
  while (at_work > 0) {
    switch (draw() % 6) {
      case 0:
        model.set_expert_bytes(least + draw() % (most - least + 1));
        break;
      case 1:
        model.set_memory(budget - draw() % (most - least));
        break;
      case 2:
        runtime->set_active_threads(1 + static_cast<int>(draw() % 3));
        break;
      case 3:
        runtime->set_io_depth(1 + static_cast<int>(draw() % 2));
        break;
      case 4:
        model.set_prefetch_depth(static_cast<int>(draw() % 4));
        break;
      default:
        model.set_token_interval_ms(draw() % 2 == 0 ? 0.0 : 0.3);
    }
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  for (auto& server : servers) server.join();
  CHECK(wrong == 0);
  const ExpertStatistics after = model.statistics().experts;
  CHECK(after.slot_bytes <= after.capacity_bytes);
  CHECK(runtime->budget()->used_bytes() <= runtime->budget()->peak_bytes());

  model.set_memory(budget);  // what was given back is read again in the background
  model.set_expert_bytes(most);
  model.set_token_interval_ms(0);
  model.set_prefetch_depth(2);  // at 0 nothing would be read
  CHECK(all_logits(model, tokens) == expected);
  while (model.statistics().experts.prefetching > 0)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  CHECK(model.statistics().experts.resident == model.statistics().experts.total);
}

TEST_CASE("a budget can be lowered to what works, and no further") {
  const TemporaryDirectory directory;
  const auto path = test::write_small_bundle(directory.path(), {});
  const auto runtime = make_runtime();
  Model model(runtime, path, {});
  const std::uint64_t others = runtime->budget()->used_bytes() - model.statistics().experts.capacity_bytes;
  const std::uint64_t least = others + model.least_expert_bytes();
  CHECK(contains(error_of(ErrorKind::budget, [&] { model.set_memory(least - 1); }), std::to_string(least)));
  model.set_memory(least);
  CHECK(runtime->budget()->limit_bytes() == least);
  CHECK(runtime->budget()->used_bytes() <= least);
  CHECK(model.statistics().experts.capacity_bytes == model.least_expert_bytes());
  CHECK(all_logits(model, some_tokens(9, SmallModel().vocab)).size() > 0);
}

TEST_CASE("decode steps keep their distance, and say how long they took without it") {
  const TemporaryDirectory directory;
  const auto path = test::write_small_bundle(directory.path(), {});
  Model model(make_runtime(), path, {});
  const auto sequence = model.sequence();
  const std::int32_t token = 3;
  const StepRow row{sequence.get(), std::span(&token, 1), Wanted::none};
  const auto step = [&] {
    model.step(std::span(&row, 1), [](std::size_t, std::size_t, std::span<float>) {}, {});
  };
  model.set_token_interval_ms(20);
  step();
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 3; ++i) step();
  CHECK(std::chrono::steady_clock::now() - start >= std::chrono::milliseconds(59));
  const auto [count, times] = model.step_times(1);
  CHECK(count == 4);
  CHECK(times.size() == 3);
  model.set_token_interval_ms(60000);
  std::thread other([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    model.cancel();
  });
  error_of(ErrorKind::cancelled, step);  // a cancel ends the wait too
  other.join();
}
