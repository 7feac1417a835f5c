#include "engine/model.h"

#include <algorithm>
#include <cmath>
#include <limits>

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
  return std::make_shared<Runtime>(RuntimeOptions{memory, threads, 2, DirectIo::automatic, ""});
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

std::uint64_t minimum(const std::filesystem::path& path, const ModelOptions& options) {
  return Model(make_runtime(), path, options).plan().minimum_bytes;
}

}  // namespace

TEST_CASE("logits are the same bits at every budget, thread count, chunk size and step pattern") {
  const TemporaryDirectory directory;
  SmallModel small;
  SUBCASE("int4 experts") {}
  SUBCASE("mixed formats") { small.expert_formats = {"int2", "int4", "int8", "int3", "f16"}; }
  SUBCASE("f32") {
    small.expert_formats = {"f32"};
    small.dense_format = "f32";
  }
  const auto path = test::write_small_bundle(directory.path(), small);
  const auto tokens = some_tokens(50, small.vocab);
  Model whole(make_runtime(), path, {});
  CHECK(whole.plan().resident());
  const std::vector<float> expected = all_logits(whole, tokens);
  REQUIRE(expected.size() == 50 * static_cast<std::size_t>(small.vocab));

  for (const int chunk : {1, 7, 16, 64}) {
    for (const int threads : {1, 2, 3}) {
      const ModelOptions options{0, 1, chunk, std::nullopt};
      const std::uint64_t least = Model(make_runtime(1 << 30, threads), path, options).plan().minimum_bytes;
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

TEST_CASE("sampling depends on seed, stream and position alone") {
  std::vector<float> logits;
  for (int i = 0; i < 50; ++i) logits.push_back(static_cast<float>(i % 7));
  SamplerOptions options;
  options.temperature = 1;
  options.seed = 3;
  const auto draw = [&](std::uint64_t seed, std::uint64_t stream, std::int64_t position) {
    SamplerOptions o = options;
    o.seed = seed;
    auto copy = logits;
    return Sampler(o, stream).sample(copy, position).token;
  };
  CHECK(draw(3, 0, 10) == draw(3, 0, 10));
  int differ = 0;
  for (int p = 0; p < 40; ++p) differ += (draw(3, 0, p) != draw(3, 1, p)) + (draw(3, 0, p) != draw(4, 0, p));
  CHECK(differ > 40);
}

TEST_CASE("top-k, top-p, min-p, bias and penalties do what their names say") {
  const std::vector<float> logits{0, 3, 2, 1, 3};
  const auto reachable = [&](const SamplerOptions& options) {
    std::vector<std::int32_t> seen;
    for (int p = 0; p < 300; ++p) {
      auto copy = logits;
      const auto token = Sampler(options).sample(copy, p).token;
      if (std::find(seen.begin(), seen.end(), token) == seen.end()) seen.push_back(token);
    }
    std::sort(seen.begin(), seen.end());
    return seen;
  };
  using Ids = std::vector<std::int32_t>;
  SamplerOptions o;
  CHECK(reachable(o) == Ids{1});  // greedy, lowest id among equals
  o.temperature = 1;
  CHECK(reachable(o) == Ids{0, 1, 2, 3, 4});
  o.top_k = 2;
  CHECK(reachable(o) == Ids{1, 4});
  o.top_k = 0;
  o.top_p = 0.85F;
  CHECK(reachable(o) == Ids{1, 2, 4});
  o.top_p = 1;
  o.min_p = 0.3F;
  CHECK(reachable(o) == Ids{1, 2, 4});
  o.min_p = 0;
  o.logit_bias = {{0, 100.0F}};
  CHECK(reachable(o) == Ids{0});

  SamplerOptions penalised;
  penalised.repetition_penalty = 2;
  Sampler sampler(penalised);
  auto copy = logits;
  sampler.accept(Ids{1});
  CHECK(sampler.sample(copy, 0).token == 4);
  copy = logits;
  CHECK(sampler.sample(copy, 1).token == 2);
}

TEST_CASE("log-probabilities are those of the model, whatever the sampling") {
  std::vector<float> logits{1, 2, 0.5F};
  SamplerOptions o;
  o.logprobs = 2;
  o.logit_bias = {{2, 50.0F}};
  const Sample sample = Sampler(o).sample(logits, 0);
  CHECK(sample.token == 2);
  const double norm = std::log(std::exp(1.0) + std::exp(2.0) + std::exp(0.5));
  CHECK(sample.logprob == doctest::Approx(0.5 - norm));
  REQUIRE(sample.top.size() == 2);
  CHECK(sample.top[0].first == 1);
  CHECK(sample.top[0].second == doctest::Approx(2 - norm));
}

TEST_CASE("sampling parameters out of range are refused by name") {
  const auto refused = [](auto set) {
    SamplerOptions o;
    set(o);
    return error_of(ErrorKind::invalid_argument, [&] { Sampler sampler(o); });
  };
  CHECK(contains(refused([](auto& o) { o.temperature = std::numeric_limits<float>::quiet_NaN(); }),
                 "temperature"));
  CHECK(contains(refused([](auto& o) { o.top_p = 0; }), "top_p"));
  CHECK(contains(refused([](auto& o) { o.min_p = 2; }), "min_p"));
  CHECK(contains(refused([](auto& o) { o.repetition_penalty = 0; }), "repetition_penalty"));
  CHECK(contains(refused([](auto& o) { o.logprobs = 1000; }), "logprobs"));
}

TEST_CASE("logits without a usable value are an error, not a token") {
  std::vector<float> logits{std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()};
  error_of(ErrorKind::invalid_argument, [&] { Sampler({}).sample(logits, 0); });
}
