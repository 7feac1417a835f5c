// Prompts that begin alike share what was computed of them: the same bits, and nobody's tokens change.
#include "engine/model.h"
#include "model_support.h"
#include "small_bundle.h"
#include "support.h"

using namespace edgert;
using test::make_runtime;
using test::some_tokens;
using test::TemporaryDirectory;

namespace {

struct Prefixes {
  TemporaryDirectory directory;
  std::filesystem::path path = test::write_small_bundle(directory.path(), {});
  std::vector<std::int32_t> tokens = some_tokens(80, 67);

  Model model(int parallel = 2) const { return {make_runtime(), path, {0, parallel, 0, KvType::int8}}; }
};

// The logits of the tokens from `first` on, of which those before are in.
std::vector<float> run(Model& model, KvSequence& sequence, std::span<const std::int32_t> tokens) {
  return test::all_logits(model, sequence, tokens.subspan(static_cast<std::size_t>(sequence.length())));
}

// Of the tokens from `first` on, computed without anything remembered.
std::vector<float> expected(const Prefixes& f, std::span<const std::int32_t> tokens, std::int64_t first) {
  Model model = f.model();
  auto all = run(model, *model.sequence(), tokens);
  all.erase(all.begin(), all.begin() + first * 67);
  return all;
}

}  // namespace

TEST_CASE("a sequence begins with the whole blocks of its prompt that were computed before, never with all") {
  const Prefixes f;
  Model model = f.model();
  run(model, *model.sequence(), f.tokens);
  for (const int length : {1, 16, 17, 40, 64, 65, 80}) {
    const std::span prompt = std::span(f.tokens).first(static_cast<std::size_t>(length));
    const auto sequence = model.sequence({}, prompt);
    CHECK(sequence->length() == (length - 1) / 16 * 16);
    CHECK(run(model, *sequence, prompt) == expected(f, prompt, (length - 1) / 16 * 16));
  }
}

TEST_CASE("a prompt that goes another way shares what is the same") {
  const Prefixes f;
  Model model = f.model();
  run(model, *model.sequence(), f.tokens);
  auto other = f.tokens;
  other[37] = (other[37] + 1) % 67;
  const auto sequence = model.sequence({}, other);
  CHECK(sequence->length() == 32);
  CHECK(run(model, *sequence, other) == expected(f, other, 32));
  CHECK(model.sequence({}, f.tokens)->length() == 64);
}

TEST_CASE("who rewinds into a shared block goes on in one of its own") {
  const Prefixes f;
  Model model = f.model();
  const auto first = model.sequence();
  run(model, *first, std::span(f.tokens).first(60));
  const auto second = model.sequence({}, f.tokens);
  REQUIRE(second->length() == 48);
  second->rewind(20);
  auto other = f.tokens;
  other[20] = (other[20] + 1) % 67;
  CHECK(run(model, *second, other) == expected(f, other, 20));
  CHECK(run(model, *first, f.tokens) == expected(f, f.tokens, 60));
}

TEST_CASE("what is remembered makes room for what runs") {
  const Prefixes f;
  Model model = f.model(1);  // six blocks
  run(model, *model.sequence(), f.tokens);
  CHECK(model.kv().blocks().idle == 5);
  const auto other = some_tokens(90, 67, 2);
  CHECK(run(model, *model.sequence(), other) == expected(f, other, 0));
  CHECK(model.sequence({}, f.tokens)->length() < 32);
}

TEST_CASE("a full context can be rewound and filled again, whatever is remembered") {
  const Prefixes f;
  Model model = f.model(1);
  const auto tokens = some_tokens(96, 67);
  const auto sequence = model.sequence();
  run(model, *sequence, tokens);
  for (const int length : {95, 80, 70, 3}) {
    sequence->rewind(length);
    CHECK(run(model, *sequence, tokens) == expected(f, tokens, length));
  }
}

TEST_CASE(
    "nothing is remembered of what others' choices or losses went into, nor across a change of weights") {
  const Prefixes f;
  Model model = f.model();
  const auto before = model.sequence();
  run(model, *before, std::span(f.tokens).first(40));
  LossyModes lossy;
  lossy.skip_experts = 0.5F;
  model.set_lossy(lossy);
  run(model, *before, f.tokens);
  run(model, *model.sequence(), f.tokens);
  CHECK(model.kv().blocks().cached == 0);
  model.set_lossy({});
  CHECK(model.sequence({}, f.tokens)->length() == 0);
  run(model, *before, some_tokens(90, 67));
  CHECK(model.kv().blocks().cached == 0);  // it began before
  run(model, *model.sequence(), f.tokens);
  CHECK(model.sequence({}, f.tokens)->length() == 64);
  model.forget_prefixes();
  CHECK(model.sequence({}, f.tokens)->length() == 0);
}
