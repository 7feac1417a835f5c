#include <algorithm>

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
using test::some_tokens;
using test::TemporaryDirectory;

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
