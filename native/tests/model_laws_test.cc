#include <algorithm>
#include <atomic>
#include <functional>
#include <thread>

#include "engine/model.h"
#include "engine/sampler.h"
#include "model_support.h"
#include "small_bundle.h"
#include "support.h"

using namespace edgert;
using test::all_logits;
using test::contains;
using test::error_of;
using test::make_runtime;
using test::minimum;
using test::SmallModel;
using test::some_tokens;
using test::TemporaryDirectory;

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
