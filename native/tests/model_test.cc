#include "engine/model.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <thread>

#include "engine/sampler.h"
#include "small_bundle.h"
#include "support.h"

using namespace edgert;
using test::contains;
using test::error_of;
using test::SmallModel;
using test::TemporaryDirectory;

namespace {

std::vector<std::int32_t> some_tokens(int count, int vocab, int seed = 1) {
  std::vector<std::int32_t> tokens;
  for (int i = 0; i < count; ++i) tokens.push_back((seed * 37 + i * i * 11 + i * 5) % vocab);
  return tokens;
}

std::shared_ptr<Runtime> make_runtime(std::uint64_t memory = 1 << 30, int threads = 1) {
  RuntimeOptions options;
  options.memory_bytes = memory;
  options.threads = threads;
  options.io_threads = 2;
  return std::make_shared<Runtime>(options);
}

std::vector<float> all_logits(Model& model, const std::vector<std::int32_t>& tokens) {
  std::vector<float> out;
  const auto sequence = model.sequence();
  const StepRow row{sequence.get(), tokens, Wanted::all};
  model.step(std::span(&row, 1),
             [&](std::size_t, std::size_t, std::span<float> l) { out.insert(out.end(), l.begin(), l.end()); },
             {});
  return out;
}

std::uint64_t minimum(const std::filesystem::path& path, const ModelOptions& options, int threads = 1) {
  return Model(make_runtime(1 << 30, threads), path, options).plan().minimum_bytes;
}

}  // namespace

TEST_CASE("logits are the same bits at every budget, thread count, chunk size and step pattern") {
  const TemporaryDirectory directory;
  SmallModel small;
  std::optional<KvType> kv_type;
  SUBCASE("int4 experts") {}
  SUBCASE("int8 KV") { kv_type = KvType::int8; }
  SUBCASE("mixed formats") { small.expert_formats = {"int2", "int4", "int8", "int3", "f16"}; }
  SUBCASE("f32") {
    small.expert_formats = {"f32"};
    small.dense_format = "f32";
  }
  const auto path = test::write_small_bundle(directory.path(), small);
  const auto tokens = some_tokens(50, small.vocab);
  Model whole(make_runtime(), path, {0, 1, 0, kv_type});
  CHECK(whole.plan().resident());
  const std::vector<float> expected = all_logits(whole, tokens);
  REQUIRE(expected.size() == 50 * static_cast<std::size_t>(small.vocab));

  for (const int chunk : {1, 7, 16, 64}) {
    for (const int threads : {1, 2, 3}) {
      const ModelOptions options{0, 1, chunk, kv_type};
      const std::uint64_t least = minimum(path, options, threads);
      Model model(make_runtime(least, threads), path, options);
      CHECK_FALSE(model.plan().resident());
      CHECK(all_logits(model, tokens) == expected);
      CHECK(model.statistics().experts.evictions > 0);
    }
  }
}

TEST_CASE("a sequence does not notice strangers in its batch") {
  const TemporaryDirectory directory;
  const SmallModel small;
  const auto path = test::write_small_bundle(directory.path(), small);
  Model model(make_runtime(1 << 30, 2), path, {0, 4, 24, std::nullopt});
  const auto tokens = some_tokens(30, small.vocab);
  const std::vector<float> alone = all_logits(model, tokens);

  const auto mine = model.sequence();
  const auto other = model.sequence();
  const auto third = model.sequence();
  std::vector<float> together;
  std::size_t at = 0;
  for (const std::size_t count : {std::size_t{11}, std::size_t{1}, std::size_t{1}, std::size_t{17}}) {
    const auto strangers = some_tokens(static_cast<int>(count) + 2, small.vocab, 5);
    const std::vector<std::int32_t> one{static_cast<std::int32_t>(count)};
    const StepRow rows[] = {{other.get(), strangers, Wanted::last},
                            {mine.get(), std::span(tokens).subspan(at, count), Wanted::all},
                            {third.get(), one, Wanted::none}};
    model.step(rows,
               [&](std::size_t row, std::size_t, std::span<float> l) {
                 if (row == 1) together.insert(together.end(), l.begin(), l.end());
               },
               {});
    at += count;
  }
  CHECK(together == alone);
}

TEST_CASE("rewinding and going on gives what going straight on gives") {
  const TemporaryDirectory directory;
  const SmallModel small;
  Model model(make_runtime(), test::write_small_bundle(directory.path(), small), {});
  const auto tokens = some_tokens(40, small.vocab);
  const auto expected = all_logits(model, tokens);
  const auto sequence = model.sequence();
  const auto wrong = some_tokens(20, small.vocab, 9);
  std::vector<float> out;
  const auto sink = [&](std::size_t, std::size_t, std::span<float> l) { out.assign(l.begin(), l.end()); };
  for (const StepRow& row : {StepRow{sequence.get(), std::span(tokens).first(25), Wanted::none},
                             StepRow{sequence.get(), wrong, Wanted::none}}) {
    model.step(std::span(&row, 1), sink, {});
  }
  sequence->rewind(25);
  const StepRow rest{sequence.get(), std::span(tokens).subspan(25), Wanted::last};
  model.step(std::span(&rest, 1), sink, {});
  CHECK(std::equal(out.begin(), out.end(), expected.end() - small.vocab));
}

TEST_CASE("the budget is the bound of everything, and the least that works is named") {
  const TemporaryDirectory directory;
  const auto path = test::write_small_bundle(directory.path(), {});
  const std::uint64_t least = minimum(path, {});
  const std::string message = error_of(ErrorKind::budget, [&] { Model(make_runtime(least - 1), path, {}); });
  CHECK(contains(message, std::to_string(least)));
  const auto runtime = make_runtime(least);
  Model model(runtime, path, {});
  all_logits(model, some_tokens(60, 67));
  CHECK(runtime->budget()->peak_bytes() <= least);
}

TEST_CASE("from the budget named on, every expert stays in memory") {
  const TemporaryDirectory directory;
  SmallModel small;
  small.hidden = 256;
  small.intermediate = 256;
  const auto path = test::write_small_bundle(directory.path(), small);
  const std::uint64_t enough = Model(make_runtime(), path, {}).plan().resident_bytes;
  CHECK(Model(make_runtime(enough), path, {}).plan().resident());
  CHECK(Model(make_runtime(enough + enough / 4), path, {}).plan().resident());
  CHECK_FALSE(Model(make_runtime(enough - 1), path, {}).plan().resident());
}

namespace {

// Until nothing is left to be read ahead of need.
ExpertStatistics settled(const Model& model) {
  while (model.statistics().experts.prefetching > 0) std::this_thread::yield();
  return model.statistics().experts;
}

}  // namespace

TEST_CASE("where all experts fit, the first step reads on demand alone, and the rest comes in afterwards") {
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

TEST_CASE("a stopped step leaves its sequence as it was, and the next one runs") {
  const TemporaryDirectory directory;
  Model model(make_runtime(), test::write_small_bundle(directory.path(), {}), {});
  const auto tokens = some_tokens(20, 67);
  const auto expected = all_logits(model, tokens);
  const auto sequence = model.sequence();
  const StepRow row{sequence.get(), tokens, Wanted::last};
  std::vector<float> out;
  const auto sink = [&](std::size_t, std::size_t, std::span<float> l) { out.assign(l.begin(), l.end()); };
  model.cancel();
  error_of(ErrorKind::cancelled, [&] { model.step(std::span(&row, 1), sink, {}); });
  CHECK(sequence->length() == 0);
  int calls = 0;
  CHECK_THROWS_AS(model.step(std::span(&row, 1), sink,
                             [&] {
                               if (++calls == 2) throw std::runtime_error("poll");
                             }),
                  std::runtime_error);
  CHECK(sequence->length() == 0);
  model.step(std::span(&row, 1), sink, {});
  CHECK(std::equal(out.begin(), out.end(), expected.end() - 67));
}

TEST_CASE("a step that fails after its first chunks leaves its sequences as they were before it") {
  const TemporaryDirectory directory;
  Model model(make_runtime(), test::write_small_bundle(directory.path(), {}), {0, 1, 8, std::nullopt});
  const auto sequence = model.sequence();
  const auto tokens = some_tokens(60, 67);
  const StepRow row{sequence.get(), tokens, Wanted::all};
  int rows = 0;
  const auto stop = [&](std::size_t, std::size_t, std::span<float>) {
    if (++rows == 30) throw std::runtime_error("enough");
  };
  CHECK_THROWS_AS(model.step(std::span(&row, 1), stop, {}), std::runtime_error);
  CHECK(sequence->length() == 0);
  const auto rest = model.sequence();  // and their room is free again
  CHECK(all_logits(model, tokens).size() == 60 * 67);
}

TEST_CASE("a step that fails takes back what it drew, so that running it again draws the same") {
  const TemporaryDirectory directory;
  Model model(make_runtime(), test::write_small_bundle(directory.path(), {}), {0, 12, 0, std::nullopt});
  SamplerOptions options;
  options.repetition_penalty = 5;
  const auto tokens = some_tokens(5, 67);
  std::vector<std::shared_ptr<KvSequence>> sequences;
  std::vector<std::unique_ptr<Sampler>> samplers;
  std::vector<SampleRow> rows;
  for (int i = 0; i < 12; ++i) {  // more than the logits of one go
    sequences.push_back(model.sequence());
    samplers.push_back(std::make_unique<Sampler>(options));
    rows.push_back({sequences.back().get(), tokens, samplers.back().get()});
  }
  const auto start_over = [&] {
    for (auto& row : rows) {
      row.sequence->rewind(0);
      samplers.push_back(std::make_unique<Sampler>(options));
      row.sampler = samplers.back().get();
    }
  };
  model.sample(rows, {});  // every expert is resident from here on, so that each run polls as often
  start_over();
  int polls = 0;
  model.sample(rows, [&] { ++polls; });
  start_over();
  const auto last = [&] {
    if (--polls == 0) throw std::runtime_error("stop at the second go");
  };
  CHECK_THROWS_AS(model.sample(rows, last), std::runtime_error);
  const auto first = model.sample(rows, {});
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const auto fresh = model.sequence();
    Sampler sampler(options);
    sequences[i]->rewind(0);
    const SampleRow row{fresh.get(), tokens, &sampler};
    CHECK(model.sample(std::span(&row, 1), {})[0]->token == first[i]->token);
  }
}

TEST_CASE("a bad row is refused before any row runs") {
  const TemporaryDirectory directory;
  Model model(make_runtime(), test::write_small_bundle(directory.path(), {}), {0, 2, 0, std::nullopt});
  SamplerOptions options;
  Sampler good(options);
  options.logit_bias = {{67, 1.0F}};
  Sampler bad(options);
  const auto first = model.sequence();
  const auto second = model.sequence();
  const auto tokens = some_tokens(3, 67);
  const SampleRow rows[] = {{first.get(), tokens, &good}, {second.get(), tokens, &bad}};
  CHECK(
      contains(error_of(ErrorKind::invalid_argument, [&] { model.sample(rows, {}); }), "row 1: logit_bias"));
  CHECK(first->length() == 0);
}

TEST_CASE("a sequence is used by its own model, and by one caller at a time") {
  const TemporaryDirectory directory;
  const auto path = test::write_small_bundle(directory.path(), {});
  Model model(make_runtime(), path, {});
  Model other(make_runtime(), path, {});
  const auto sequence = model.sequence();
  const auto tokens = some_tokens(3, 67);
  const StepRow row{sequence.get(), tokens, Wanted::last};
  CHECK(contains(error_of(ErrorKind::invalid_argument, [&] { other.step(std::span(&row, 1), {}, {}); }),
                 "another model"));
  std::string refusal;
  model.step(std::span(&row, 1),
             [&](std::size_t, std::size_t, std::span<float>) {
               refusal = error_of(ErrorKind::invalid_argument, [&] { sequence->rewind(0); });
             },
             {});
  CHECK(contains(refusal, "in a step that runs"));
  CHECK(sequence->length() == 3);
  sequence->rewind(0);
}

TEST_CASE("a sequence may outlive its model") {
  const TemporaryDirectory directory;
  auto model =
      std::make_unique<Model>(make_runtime(), test::write_small_bundle(directory.path(), {}), ModelOptions{});
  const auto sequence = model->sequence();
  const auto tokens = some_tokens(30, 67);
  const StepRow row{sequence.get(), tokens, Wanted::none};
  model->step(std::span(&row, 1), {}, {});
  model.reset();
  sequence->rewind(3);
  CHECK(sequence->length() == 3);
}

TEST_CASE("models of one runtime run side by side, each with the memory that it was promised") {
  const TemporaryDirectory directory;
  const auto path = test::write_small_bundle(directory.path(), {});
  const auto tokens = some_tokens(60, 67);
  Model alone(make_runtime(), path, {});
  const auto expected = all_logits(alone, tokens);
  const std::uint64_t least = minimum(path, {}, 2);
  const auto runtime = make_runtime(2 * least, 2);
  Model first(runtime, path, {0, 1, 8, std::nullopt});
  const std::string refusal = error_of(ErrorKind::budget, [&] { Model(runtime, path, {}); });
  CHECK(contains(refusal, std::to_string(runtime->budget()->used_bytes() + least)));

  const auto roomy = make_runtime(std::uint64_t{1} << 30, 2);
  Model one(roomy, path, {});
  Model two(roomy, path, {});
  std::vector<float> from_two;
  std::thread thread([&] { from_two = all_logits(two, tokens); });
  const auto from_one = all_logits(one, tokens);
  thread.join();
  CHECK(from_one == expected);
  CHECK(from_two == expected);
}

TEST_CASE("any thread may look at a model, cancel it and touch its sequences while a step runs") {
  const TemporaryDirectory directory;
  const auto path = test::write_small_bundle(directory.path(), {});
  Model model(make_runtime(minimum(path, {})), path, {});
  const auto sequence = model.sequence();
  const auto tokens = some_tokens(60, 67);
  Sampler sampler({});
  std::atomic<bool> done{false};
  std::thread bystander([&] {
    while (!done) {
      model.statistics();
      model.residency();
      model.cancel();
      sequence->length();
      sampler.accept(std::span(tokens).first(1));
      try {
        sequence->rewind(0);
      } catch (const Error&) {
      }
    }
  });
  const SampleRow row{sequence.get(), tokens, &sampler};
  for (int i = 0; i < 30; ++i) {
    try {
      model.sample(std::span(&row, 1), {});
      sequence->rewind(0);
    } catch (const Error&) {
    }
  }
  done = true;
  bystander.join();
  try {  // a cancellation that came too late meets the next step
    all_logits(model, {1});
  } catch (const Error&) {
  }
  sequence->rewind(0);
  CHECK(all_logits(model, tokens).size() == 60 * 67);
}

TEST_CASE("small and full mixtures of experts run in the least memory") {
  const TemporaryDirectory directory;
  SmallModel small;
  SUBCASE("one expert") { small.experts = small.per_token = small.layers = 1; }
  SUBCASE("every expert for every token") { small.per_token = small.experts; }
  SUBCASE("sizes of a page and of many") {
    small.hidden = small.intermediate = 256;
    small.expert_formats = {"int2", "f32"};
  }
  const auto path = test::write_small_bundle(directory.path(), small);
  const ModelOptions options{0, 1, 200, std::nullopt};  // a chunk longer than the context
  Model whole(make_runtime(), path, options);
  CHECK(whole.plan().chunk == small.context);
  const auto tokens = some_tokens(small.context, small.vocab);  // the context exactly full
  Model least(make_runtime(whole.plan().minimum_bytes), path, options);
  CHECK(all_logits(least, tokens) == all_logits(whole, tokens));
}

TEST_CASE("sizes that no memory holds are refused, not wrapped around") {
  const TemporaryDirectory directory;
  SmallModel small;
  small.context = 1 << 30;
  const auto path = test::write_small_bundle(directory.path(), small);
  const std::string message =
      error_of(ErrorKind::budget, [&] { Model(make_runtime(), path, {1 << 30, 1024, 0, {}}); });
  CHECK(contains(message, "KV cache"));
  Recipe recipe;
  recipe.blocks.emplace_back();
  AttentionRecipe attention;
  attention.num_kv_heads = 1 << 12;
  attention.head_dim = 512;
  recipe.blocks[0].mixer = attention;
  recipe.layers.assign(1 << 16, 0);
  const KvPool::Shape shape{std::int64_t{1} << 30, 1 << 12};
  CHECK(KvPool::kv_bytes(KvLayout(recipe, KvType::f32), shape) == kUnaddressable);
  GatedDeltaRecipe delta;
  delta.num_key_heads = delta.num_value_heads = 1 << 12;
  delta.key_head_dim = delta.value_head_dim = 512;
  delta.conv_kernel = 4;
  recipe.blocks[0].mixer = delta;
  CHECK(KvPool::state_bytes(StateLayout(recipe), shape) == kUnaddressable);
}

TEST_CASE("a load can be stopped, and leaves nothing behind") {
  const TemporaryDirectory directory;
  const auto path = test::write_small_bundle(directory.path(), {});
  const auto runtime = make_runtime();
  CHECK_THROWS_AS(Model(runtime, path, {}, [] { throw std::runtime_error("stop"); }), std::runtime_error);
  CHECK(runtime->budget()->used_bytes() == 0);
}

TEST_CASE("what cannot run is refused before anything runs") {
  const TemporaryDirectory directory;
  const auto path = test::write_small_bundle(directory.path(), {});
  Model model(make_runtime(), path, {});
  const auto sequence = model.sequence();
  const auto step = [&](std::vector<std::int32_t> tokens) {
    const StepRow row{sequence.get(), tokens, Wanted::none};
    model.step(std::span(&row, 1), [](std::size_t, std::size_t, std::span<float>) {}, {});
  };
  CHECK(contains(error_of(ErrorKind::invalid_argument, [&] { step({}); }), "no tokens"));
  CHECK(contains(error_of(ErrorKind::invalid_argument, [&] { step({1, 67}); }),
                 "token 1 is 67, allowed 0 to 66"));
  CHECK(contains(error_of(ErrorKind::invalid_argument, [&] { step({-1}); }), "-1"));
  CHECK(contains(error_of(ErrorKind::invalid_argument, [&] { step(some_tokens(97, 67)); }), "97"));
  const std::vector<std::int32_t> one{1};
  const StepRow twice[] = {{sequence.get(), one, Wanted::none}, {sequence.get(), one, Wanted::none}};
  CHECK(contains(error_of(ErrorKind::invalid_argument, [&] { model.step(twice, {}, {}); }), "twice"));
  CHECK(contains(error_of(ErrorKind::invalid_argument, [&] { Model(make_runtime(), path, {97, 1, 0, {}}); }),
                 "context"));
  CHECK(contains(error_of(ErrorKind::invalid_argument, [&] { Model(make_runtime(), path, {0, 0, 0, {}}); }),
                 "parallel"));
}

TEST_CASE("a full KV cache is an error of the request that found it full") {
  const TemporaryDirectory directory;
  Model model(make_runtime(), test::write_small_bundle(directory.path(), {}), {});
  const auto first = model.sequence();
  const auto second = model.sequence();
  const auto run = [&](KvSequence& sequence, int count) {
    const auto tokens = some_tokens(count, 67);
    const StepRow row{&sequence, tokens, Wanted::none};
    model.step(std::span(&row, 1), [](std::size_t, std::size_t, std::span<float>) {}, {});
  };
  run(*first, 80);
  CHECK(contains(error_of(ErrorKind::budget, [&] { run(*second, 20); }), "KV cache is full"));
  run(*first, 16);
  first->rewind(0);
  run(*second, 90);
}

namespace {

// One choice a layer, different at every position: expert p + layer, and the one after.
ImposedRouting::Table marching(int positions, const SmallModel& small) {
  ImposedRouting::Table table;
  for (int p = 0; p < positions; ++p) {
    auto& layers = table.emplace_back();
    for (int l = 0; l < small.layers; ++l)
      layers.push_back({(p + l + 1) % small.experts, (p + l) % small.experts});
  }
  return table;
}

}  // namespace

TEST_CASE("an imposed routing is what is used, by position, and changes no law") {
  const TemporaryDirectory directory;
  const SmallModel small;
  const auto path = test::write_small_bundle(directory.path(), small);
  const auto tokens = some_tokens(50, small.vocab);
  Model whole(make_runtime(), path, {});
  const auto own = all_logits(whole, tokens);
  const auto own_experts = whole.last_experts();
  whole.impose_routing(marching(20, small));
  const auto expected = all_logits(whole, tokens);
  CHECK(expected != own);
  for (int l = 0; l < small.layers; ++l) {  // position 49 is 9 of the second round
    std::vector<std::int32_t> wanted{(9 + l + 1) % small.experts, (9 + l) % small.experts};
    std::sort(wanted.begin(), wanted.end());
    CHECK(whole.last_experts()[static_cast<std::size_t>(l)] == wanted);
  }

  const ModelOptions options{0, 1, 7, std::nullopt};
  Model least(make_runtime(minimum(path, options, 2), 2), path, options);
  least.impose_routing(marching(20, small));
  CHECK(all_logits(least, tokens) == expected);

  whole.impose_routing({});
  CHECK(all_logits(whole, tokens) == own);
  CHECK(whole.last_experts() == own_experts);
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

TEST_CASE("a routing that does not fit the model is refused by its position and layer") {
  const TemporaryDirectory directory;
  const SmallModel small;
  Model model(make_runtime(), test::write_small_bundle(directory.path(), small), {});
  const auto refusal = [&](const std::function<void(ImposedRouting::Table&)>& spoil) {
    auto table = marching(3, small);
    spoil(table);
    return error_of(ErrorKind::invalid_argument, [&] { model.impose_routing(table); });
  };
  CHECK(contains(refusal([](auto& t) { t[2].pop_back(); }), "position 2: found 2"));
  CHECK(contains(refusal([](auto& t) { t[1][2].pop_back(); }), "position 1, MoE layer 2: found 1"));
  CHECK(contains(refusal([](auto& t) { t[1][2][0] = 6; }), "expert 6, allowed 0 to 5"));
  CHECK(contains(refusal([](auto& t) { t[1][2][0] = -1; }), "expert -1"));
  CHECK(contains(refusal([](auto& t) { t[0][0] = {3, 3}; }), "expert 3 stands twice"));
}
