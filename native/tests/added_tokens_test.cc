// Adapters that bring tokens: the embedding and the output have rows for them behind their own.
#include <algorithm>
#include <cmath>

#include "engine/model.h"
#include "kernels_support.h"
#include "model_support.h"
#include "small_bundle.h"
#include "support.h"

using namespace edgert;
using test::contains;
using test::error_of;
using test::make_runtime;
using test::SmallModel;
using test::some_tokens;
using test::TemporaryDirectory;

namespace {

// An adapter that brings `added` tokens, with LoRA of a head that has them.
struct Bringing {
  Bringing(const SmallModel& small, int added, unsigned seed) : added_tokens(added) {
    Random random(seed);
    const auto numbers = [&](int count, int cols) {
      return random_vector(static_cast<std::size_t>(count * cols), -0.3F, 0.3F, random);
    };
    embeddings = numbers(added, small.hidden);
    head = numbers(added, small.hidden);
    a = numbers(2, small.hidden);
    b = numbers(small.vocab + added, 2);
    for (int i = 0; i < added; ++i) rows.push_back(small.vocab + i);
  }
  std::vector<AdapterSource> sources() const {
    AdapterSource embedding;
    embedding.target = "embedding";
    embedding.weights = std::as_bytes(std::span(embeddings));
    embedding.weight_rows = rows;
    AdapterSource output;
    output.target = "output";
    output.weights = std::as_bytes(std::span(head));
    output.weight_rows = rows;
    output.rank = 2;
    output.a = std::as_bytes(std::span(a));
    output.b = std::as_bytes(std::span(b));
    return {embedding, output};
  }
  std::shared_ptr<const Adapter> made(const Model& model, const std::string& name = "bringing") const {
    return model.adapter(name, sources(), 0, static_cast<std::size_t>(added_tokens));
  }
  int added_tokens;
  std::vector<float> embeddings, head, a, b;
  std::vector<std::int32_t> rows;
};

using Rows = std::vector<std::vector<float>>;

// Of every token of every sequence, in one step.
std::vector<Rows> logits(Model& model, const std::vector<AdapterMix>& mixes,
                         const std::vector<std::vector<std::int32_t>>& tokens) {
  std::vector<Rows> out(mixes.size());
  std::vector<std::shared_ptr<KvSequence>> sequences;
  std::vector<StepRow> rows;
  for (std::size_t i = 0; i < mixes.size(); ++i) {
    sequences.push_back(model.sequence(mixes[i]));
    rows.push_back({sequences.back().get(), tokens[i], Wanted::all});
  }
  model.step(
      rows,
      [&](std::size_t row, std::size_t, std::span<float> l) { out[row].emplace_back(l.begin(), l.end()); },
      {});
  return out;
}

}  // namespace

TEST_CASE("added tokens have logits of their own, and leave the others' as they are") {
  for (const int added : {1, 2, 64}) {
    const TemporaryDirectory directory;
    const SmallModel small;
    Model model(make_runtime(1 << 30, 2), test::write_small_bundle(directory.path(), small), {0, 4, 16, {}});
    const Bringing numbers(small, added, 1);
    const AdapterMix with{{{numbers.made(model), 1}}};
    const auto tokens = some_tokens(12, small.vocab);
    const Rows plain = logits(model, {{}}, {tokens})[0];
    const Rows found = logits(model, {with}, {tokens})[0];
    for (const auto& row : plain) REQUIRE(row.size() == static_cast<std::size_t>(small.vocab));
    for (const auto& row : found) {
      REQUIRE(row.size() == static_cast<std::size_t>(small.vocab + added));
      for (std::size_t i = 0; i < static_cast<std::size_t>(added); ++i)
        CHECK(row[static_cast<std::size_t>(small.vocab) + i] != 0);
    }
    auto longer = tokens;
    longer.push_back(small.vocab + added - 1);  // the last one
    const Rows more = logits(model, {with}, {longer})[0];
    CHECK(std::equal(found.begin(), found.end(), more.begin()));
    const auto together = logits(model, {{}, with, {}}, {tokens, longer, tokens});
    CHECK(together[0] == plain);
    CHECK(together[1] == more);
    CHECK(together[2] == plain);
  }
}

TEST_CASE("rows of added tokens are whole at any scale") {
  const TemporaryDirectory directory;
  const SmallModel small;
  Model model(make_runtime(), test::write_small_bundle(directory.path(), small), {});
  Bringing numbers(small, 3, 1);
  std::fill(numbers.b.begin(), numbers.b.end(), 0.0F);
  const auto adapter = numbers.made(model);
  const std::vector<std::int32_t> tokens = {1, small.vocab + 1, small.vocab + 2, 3};
  const Rows whole = logits(model, {{{{adapter, 1}}}}, {tokens})[0];
  const Rows half = logits(model, {{{{adapter, 0.5F}}}}, {tokens})[0];
  CHECK(half == whole);
}

TEST_CASE("a token that an adapter brings is drawn, and is refused without the adapter") {
  const TemporaryDirectory directory;
  const SmallModel small;
  Model model(make_runtime(), test::write_small_bundle(directory.path(), small), {});
  const AdapterMix mix{{{Bringing(small, 2, 1).made(model), 1}}};
  SamplerOptions options;
  options.logit_bias = {{small.vocab + 1, 1000.0F}};
  Sampler sampler(options);
  const auto tokens = some_tokens(5, small.vocab);
  auto sequence = model.sequence(mix);
  CHECK(model.vocab_size(*sequence) == small.vocab + 2);
  const SampleRow row{sequence.get(), tokens, &sampler};
  const auto drawn = model.sample(std::span(&row, 1), {});
  REQUIRE(drawn[0].has_value());
  CHECK(drawn[0]->token == small.vocab + 1);
  const auto plain = model.sequence();
  const SampleRow biased{plain.get(), tokens, &sampler};
  CHECK(contains(error_of(ErrorKind::invalid_argument, [&] { model.sample(std::span(&biased, 1), {}); }),
                 std::to_string(small.vocab + 1)));
  const auto refuse = [&](const AdapterMix& its, std::int32_t token) {
    return error_of(ErrorKind::invalid_argument, [&] { logits(model, {its}, {{token}}); });
  };
  CHECK(contains(refuse({}, small.vocab), "allowed 0 to " + std::to_string(small.vocab - 1)));
  CHECK(contains(refuse(mix, small.vocab + 2), "allowed 0 to " + std::to_string(small.vocab + 1)));
}

TEST_CASE("all of a sequence's adapters that bring tokens bring as many, and the last one's stand") {
  const TemporaryDirectory directory;
  const SmallModel small;
  Model model(make_runtime(), test::write_small_bundle(directory.path(), small), {});
  Bringing numbers(small, 2, 1), others(small, 2, 2);
  for (Bringing* one : {&numbers, &others}) std::fill(one->b.begin(), one->b.end(), 0.0F);
  const auto first = numbers.made(model, "first"), second = others.made(model, "second");
  const auto three = Bringing(small, 3, 3).made(model, "three");
  const std::vector<std::int32_t> tokens = {small.vocab, 5, small.vocab + 1};
  const Rows both = logits(model, {{{{first, 1}, {second, 1}}}}, {tokens})[0];
  const Rows last = logits(model, {{{{second, 1}}}}, {tokens})[0];
  for (std::size_t i = 0; i < both.size(); ++i) {
    for (std::size_t j = 0; j < both[i].size(); ++j)
      CHECK(both[i][j] == doctest::Approx(last[i][j]).epsilon(1e-4));
  }
  const auto error =
      error_of(ErrorKind::invalid_argument, [&] { model.sequence({{{first, 1}, {three, 1}}}); });
  CHECK(contains(error, "adapter three brings 3 tokens and adapter first brings 2"));
  AdapterMix gated{{{first, 1}}};
  gated.top_k = 1;
  CHECK_THROWS_AS(model.sequence(gated), Error);
}

TEST_CASE("a token that is brought has weights of embedding and output") {
  const TemporaryDirectory directory;
  const SmallModel small;
  Model model(make_runtime(), test::write_small_bundle(directory.path(), small), {});
  const Bringing numbers(small, 2, 1);
  const auto refuse = [&](std::vector<AdapterSource> sources, std::size_t added) {
    return error_of(ErrorKind::invalid_argument,
                    [&] { static_cast<void>(model.adapter("bad", sources, 0, added)); });
  };
  auto sources = numbers.sources();
  sources.pop_back();
  CHECK(contains(refuse(sources, 2), "brings 2 tokens and gives 0 of them weights of output"));
  sources = numbers.sources();
  sources[0].weight_rows = sources[0].weight_rows.first(1);
  sources[0].weights = sources[0].weights.first(sources[0].weights.size() / 2);
  CHECK(contains(refuse(sources, 2), "gives 1 of them weights of embedding"));
  CHECK(contains(refuse(numbers.sources(), 1), "output"));  // its head has another width
  CHECK(contains(refuse(numbers.sources(), std::size_t{1} << 40), "at most"));
}

TEST_CASE("room for wider logits is the budget's, and given back") {
  const TemporaryDirectory directory;
  const SmallModel small;
  const auto runtime = make_runtime();
  Model model(runtime, test::write_small_bundle(directory.path(), small), {});
  const std::uint64_t before = runtime->budget()->used_bytes();
  auto adapter = Bringing(small, 64, 1).made(model);
  const std::uint64_t loaded = runtime->budget()->used_bytes();
  auto sequence = model.sequence({{{adapter, 1}}});
  const auto width = static_cast<std::uint64_t>(small.vocab + 64);
  CHECK(runtime->budget()->used_bytes() >= loaded + width * (8 * sizeof(float) + sizeof(Candidate)));
  sequence.reset();
  adapter.reset();
  model.trim_adapters();
  CHECK(runtime->budget()->used_bytes() == before);
}
