// Adapters in a whole model of integer formats: the laws hold with them as without.
#include <algorithm>
#include <cmath>

#include "engine/model.h"
#include "kernels_support.h"
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

constexpr std::uint64_t kRoom = 1 << 20;

// LoRA of the head, and of gate and down of some experts of every layer; the same numbers every time.
std::shared_ptr<const Adapter> some_adapter(const Model& model, const SmallModel& small, unsigned seed = 1) {
  Random random(seed);
  std::vector<std::vector<float>> numbers;
  std::vector<AdapterSource> sources;
  const auto add = [&](const std::string& target, int outputs, int inputs) {
    AdapterSource& source = sources.emplace_back();
    source.target = target;
    source.rank = 2;
    numbers.push_back(random_vector(2 * static_cast<std::size_t>(inputs), -0.3F, 0.3F, random));
    source.a = std::as_bytes(std::span(numbers.back()));
    numbers.push_back(random_vector(2 * static_cast<std::size_t>(outputs), -0.3F, 0.3F, random));
    source.b = std::as_bytes(std::span(numbers.back()));
  };
  numbers.reserve(100);
  add("output", small.vocab, small.hidden);
  for (int layer = 0; layer < small.layers; ++layer) {
    for (int expert = 0; expert < small.experts; expert += 2) {
      const std::string name = "layers." + std::to_string(layer) + ".experts." + std::to_string(expert);
      add(name + ".gate", small.intermediate, small.hidden);
      add(name + ".down", small.hidden, small.intermediate);
    }
  }
  return model.adapter("some", sources);
}

}  // namespace

TEST_CASE("with an adapter, logits are the same bits at every budget, thread count and chunk size") {
  const TemporaryDirectory directory;
  const SmallModel small;
  const auto path = test::write_small_bundle(directory.path(), small);
  const auto tokens = some_tokens(40, small.vocab);
  Model whole(make_runtime(), path, {});
  const auto plain = all_logits(whole, tokens, {});
  const auto expected = all_logits(whole, tokens, {{{some_adapter(whole, small), 0.5F}}});
  CHECK(expected != plain);
  CHECK(all_logits(whole, tokens, {}) == plain);
  for (const int chunk : {1, 7, 64}) {
    for (const int threads : {1, 3}) {
      ModelOptions options{0, 1, chunk, std::nullopt};
      options.adapter_bytes = kRoom;
      Model model(make_runtime(minimum(path, options, threads), threads), path, options);
      CHECK_FALSE(model.plan().resident());
      CHECK(all_logits(model, tokens, {{{some_adapter(model, small), 0.5F}}}) == expected);
      CHECK(all_logits(model, tokens, {}) == plain);
    }
  }
}

TEST_CASE("sequences with different adapters share a step and do not notice") {
  const TemporaryDirectory directory;
  const SmallModel small;
  Model model(make_runtime(1 << 30, 2), test::write_small_bundle(directory.path(), small), {0, 4, 16, {}});
  const auto one = some_adapter(model, small, 1);
  const auto two = some_adapter(model, small, 2);
  const std::vector<AdapterMix> mixes = {{}, {{{one, 1}}}, {{{two, 1}}}, {{{two, 0.5F}, {one, -1}}}};
  test::check_shared_step(model, mixes, small.vocab);
}

TEST_CASE("an adapter belongs to its model, stands once in a mix and has a finite scale") {
  const TemporaryDirectory directory;
  const SmallModel small;
  const auto path = test::write_small_bundle(directory.path(), small);
  Model model(make_runtime(), path, {});
  std::shared_ptr<const Adapter> stranger;
  {
    Model other(make_runtime(), path, {});
    stranger = some_adapter(other, small);
  }
  const auto own = some_adapter(model, small);
  const auto refuse = [&](AdapterMix mix) {
    return error_of(ErrorKind::invalid_argument, [&] { model.sequence(std::move(mix)); });
  };
  CHECK(contains(refuse({{{stranger, 1}}}), "adapter some: was made for another model"));
  CHECK(contains(refuse({{{own, 1}, {own, 1}}}), "stands twice"));
  CHECK(contains(refuse({{{own, std::nanf("")}}}), "not finite"));
}

TEST_CASE("an adapter that adds nothing to a norm, a table or a matrix changes nothing") {
  const TemporaryDirectory directory;
  const SmallModel small;
  Model model(make_runtime(), test::write_small_bundle(directory.path(), small), {});
  std::vector<AdapterSource> nothing(4);
  for (std::size_t i = 0; const char* target : {"final_norm", "embedding", "output", "layers.0.experts.1.up"})
    nothing[i++].target = target;
  const auto tokens = some_tokens(9, small.vocab);
  CHECK(all_logits(model, tokens, {{{model.adapter("empty", nothing), 1}}}) == all_logits(model, tokens));
}

TEST_CASE("a budget without room for adapters names the knob that keeps some") {
  const TemporaryDirectory directory;
  const SmallModel small;
  const auto path = test::write_small_bundle(directory.path(), small);
  Model model(make_runtime(minimum(path, {})), path, {});
  const auto make = [&] { static_cast<void>(some_adapter(model, small)); };
  CHECK(contains(error_of(ErrorKind::budget, make), "adapter_memory"));
}

TEST_CASE("an adapter may be let go while a sequence uses it") {
  const TemporaryDirectory directory;
  const SmallModel small;
  const auto runtime = make_runtime();
  Model model(runtime, test::write_small_bundle(directory.path(), small), {});
  const auto tokens = some_tokens(9, small.vocab);
  const auto expected = all_logits(model, tokens, {{{some_adapter(model, small), 1}}});
  const std::uint64_t before = runtime->budget()->used_bytes();
  auto sequence = model.sequence({{{some_adapter(model, small), 1}}});  // which alone holds it
  CHECK(all_logits(model, *sequence, tokens) == expected);
  CHECK(runtime->budget()->used_bytes() > before);
  sequence.reset();
  CHECK(runtime->budget()->used_bytes() == before);
}
