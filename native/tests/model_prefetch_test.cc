#include <fstream>
#include <thread>

#include "engine/model.h"
#include "model_support.h"
#include "small_bundle.h"
#include "support.h"

using namespace edgert;
using test::all_logits;
using test::contains;
using test::error_of;
using test::make_runtime;
using test::SmallModel;
using test::some_tokens;
using test::TemporaryDirectory;

namespace {

// Until nothing is left to be read ahead of need.
ExpertStatistics settled(const Model& model) {
  while (model.statistics().experts.prefetching > 0) std::this_thread::yield();
  return model.statistics().experts;
}

}  // namespace

TEST_CASE("where all experts fit, the first step reads what it needs, and the rest comes in afterwards") {
  const TemporaryDirectory directory;
  Model model(make_runtime(), test::write_small_bundle(directory.path(), {}), {});
  const auto sequence = model.sequence();
  const std::vector<std::int32_t> one{3};
  const StepRow row{sequence.get(), one, Wanted::last};
  model.step(std::span(&row, 1),
             [&](std::size_t, std::size_t, std::span<float>) {
               const ExpertStatistics s = model.statistics().experts;
               CHECK(s.prefetching == 0);
               CHECK(s.prefetched_bytes == 0);
               CHECK(s.resident == 3 * 2);
             },
             {});
  const ExpertStatistics filled = settled(model);
  CHECK(filled.resident == filled.total);
  CHECK(filled.prefetched_bytes == 2 * filled.demand_bytes);  // four experts of a layer, and two
  all_logits(model, some_tokens(60, 67));
  const ExpertStatistics s = model.statistics().experts;
  CHECK(s.misses == filled.misses);
  CHECK(s.prefetch_hits == 3 * 4);
}

TEST_CASE("an expert that is damaged is the error of the step that needs it, not of the one that fills") {
  const TemporaryDirectory directory;
  const auto path = test::write_small_bundle(directory.path(), {});
  const auto tokens = some_tokens(60, 67);
  Model whole(make_runtime(), path, {});
  whole.impose_routing({{{0, 1}, {0, 1}, {0, 1}}});
  const auto expected = all_logits(whole, tokens);
  settled(whole);
  {
    const Bundle bundle = Bundle::open(path, DirectIo::off);
    const auto offset = bundle.manifest().experts[1].experts[3].extent.offset;
    std::fstream file(path / "experts-00000.bin", std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(offset) + 5);
    file.put('\x55');
  }
  Model model(make_runtime(), path, {});
  model.impose_routing({{{0, 1}, {0, 1}, {0, 1}}});
  CHECK(all_logits(model, tokens) == expected);
  CHECK(settled(model).resident < 18);
  CHECK(all_logits(model, tokens) == expected);
  model.impose_routing({{{0, 1}, {0, 3}, {0, 1}}});
  CHECK(contains(error_of(ErrorKind::corrupt, [&] { all_logits(model, tokens); }), "expert 3 of layer 1"));
  model.impose_routing({{{0, 1}, {0, 1}, {0, 1}}});
  CHECK(all_logits(model, tokens) == expected);
}

TEST_CASE("a model that fills can be closed at once") {
  const TemporaryDirectory directory;
  const auto path = test::write_small_bundle(directory.path(), {});
  for (int i = 0; i < 10; ++i) {
    Model model(make_runtime(), path, {});
    all_logits(model, {1});
  }
}

TEST_CASE("a step that uses most experts of a layer has the next layer's read before its router has spoken") {
  const TemporaryDirectory directory;
  const auto path = test::write_small_bundle(directory.path(), {});
  const auto prefetched = [&](const std::vector<int>& second) {
    Model model(make_runtime(), path, {});
    model.impose_routing({{{0, 1}, {0, 1}, {0, 1}}, {second, second, second}});
    std::uint64_t bytes = 0;
    const auto sequence = model.sequence();
    const std::vector<std::int32_t> two{3, 5};
    const StepRow row{sequence.get(), two, Wanted::last};
    model.step(std::span(&row, 1),
               [&](std::size_t, std::size_t, std::span<float>) {
                 bytes = model.statistics().experts.prefetched_bytes;
               },
               {});
    return bytes;
  };
  CHECK(prefetched({1, 2}) == 0);  // three of six
  CHECK(prefetched({2, 3}) > 0);   // four of six
}

TEST_CASE("in a prefill that uses every expert the next layer is read ahead, and nothing twice") {
  const TemporaryDirectory directory;
  SmallModel small;
  small.layers = 4;
  small.experts = 8;
  small.per_token = 4;
  const auto path = test::write_small_bundle(directory.path(), small);
  const auto tokens = some_tokens(64, small.vocab);
  ImposedRouting::Table routing;
  for (int p = 0; p < 2; ++p)
    routing.emplace_back(4, p == 0 ? std::vector{0, 1, 2, 3} : std::vector{4, 5, 6, 7});
  const ModelOptions options{0, 1, 32, std::nullopt};
  Model whole(make_runtime(), path, options);
  whole.impose_routing(routing);
  const auto expected = all_logits(whole, tokens);

  const std::uint64_t slot =
      ExpertStore::slot_bytes(Bundle::open(path, DirectIo::off).manifest().experts[0].experts[0]);
  for (const std::uint64_t more : {0, 5, 6, 9, 14, 22, 29}) {
    for (const int threads : {1, 2}) {
      const std::uint64_t least = Model(make_runtime(1 << 30, threads), path, options).plan().minimum_bytes;
      const auto runtime = make_runtime(least + more * slot, threads);
      Model model(runtime, path, options);
      model.impose_routing(routing);
      for (int i = 0; i < 3; ++i) CHECK(all_logits(model, tokens) == expected);
      const ExpertStatistics s = model.statistics().experts;
      const std::uint64_t slots = model.plan().slots_bytes / slot;
      CAPTURE(slots);
      CHECK_FALSE(model.plan().resident());
      CHECK(s.demand_bytes + s.prefetched_bytes <= slot * 3 * 2 * 4 * 8);
      CHECK((s.prefetched_bytes > 0) == (slots >= 8));
      CHECK(s.prefetch_hits * slot <= s.prefetched_bytes);
      CHECK(s.slot_bytes <= s.capacity_bytes);
      CHECK(runtime->budget()->peak_bytes() <= runtime->budget()->limit_bytes());
    }
  }
}

TEST_CASE("whatever is read ahead of single tokens, the bits are the same") {
  const TemporaryDirectory directory;
  SmallModel small;
  small.layers = 4;
  small.experts = 12;
  const auto path = test::write_small_bundle(directory.path(), small);
  const auto tokens = some_tokens(48, small.vocab);
  const auto expected = all_logits(*std::make_unique<Model>(make_runtime(), path, ModelOptions{}), tokens);
  const std::uint64_t slot =
      ExpertStore::slot_bytes(Bundle::open(path, DirectIo::off).manifest().experts[0].experts[0]);
  ModelOptions options;
  options.chunk = 1;
  options.prefetch = Prediction::router;
  for (const Eviction eviction : {Eviction::forecast, Eviction::lru}) {
    options.eviction = eviction;
    for (const std::uint64_t more : {0, 6, 12, 30}) {
      for (const int threads : {1, 2}) {
        const std::uint64_t least = Model(make_runtime(1 << 30, threads), path, options).plan().minimum_bytes;
        const auto runtime = make_runtime(least + more * slot, threads);
        Model model(runtime, path, options);
        CHECK(model.prefetch() == Prediction::router);
        std::atomic<bool> done{false};
        std::thread watcher([&] {  // statistics and the switch are anybody's
          for (bool on = true; !done; on = !on) {
            model.force_preload(on);
            const PreloadStatistics seen = model.statistics().preload;
            CHECK(seen.used <= seen.expected);
          }
        });
        for (int i = 0; i < 2; ++i) CHECK(all_logits(model, tokens) == expected);
        done = true;
        watcher.join();
        model.force_preload(true);
        CHECK(all_logits(model, tokens) == expected);
        const ModelStatistics s = model.statistics();
        CHECK(s.preload.steps == 3 * tokens.size());
        CHECK((more == 0 || s.experts.prefetches > 0));
        CHECK(s.experts.wasted_bytes <= s.experts.prefetched_bytes);
        CHECK(s.experts.slot_bytes <= s.experts.capacity_bytes);
        CHECK(runtime->budget()->peak_bytes() <= runtime->budget()->limit_bytes());
      }
    }
  }
}
