// Patches in a whole model: switches, fusions, evictions and page-ins in any order, and no byte is lost.
#include <algorithm>
#include <random>

#include "engine/model.h"
#include "kernels_support.h"
#include "model_support.h"
#include "small_bundle.h"
#include "sparse_sources.h"
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

std::shared_ptr<const Adapter> sparse_adapter(const Model& model, const SmallModel& small, unsigned seed,
                                              bool with_remainders = true) {
  const test::SparseSources sparse(small, seed, with_remainders);
  return model.adapter("sparse " + std::to_string(seed), sparse.sources);
}

AdapterMix patched(Model& model, std::vector<AdapterMix::Entry> entries) {
  AdapterMix mix{std::move(entries), nullptr};
  mix.patch = model.patches(mix);
  return mix;
}

SmallModel with_formats(std::vector<std::string> experts, const std::string& dense) {
  SmallModel small;
  small.expert_formats = std::move(experts);
  small.dense_format = dense;
  return small;
}

}  // namespace

TEST_CASE(
    "random switches, fusions, evictions and page-ins leave the bundle's bytes, and the logits of a fresh "
    "load") {
  const TemporaryDirectory directory;
  const SmallModel smalls[] = {with_formats({"int4"}, "int8"), with_formats({"int8", "int2", "int3"}, "int4"),
                               with_formats({"int4_32", "nl4"}, "q4_0"), with_formats({"int3"}, "f32")};
  for (const SmallModel& small : smalls) {
    const auto path = test::write_small_bundle(directory.path(), small);
    const auto tokens = some_tokens(5, small.vocab);
    // What fresh loads with each mix give.
    constexpr float kScales[][3] = {{0, 0, 0},     {1, 0, 0},    {0, 1, 0},
                                    {0, 0, -0.5F}, {1, 0.5F, 0}, {0.25F, 1, 1}};
    const auto mix_of = [&](Model& model, const auto& adapters, const float (&scales)[3]) {
      std::vector<AdapterMix::Entry> entries;
      for (std::size_t i = 0; i < 3; ++i) {
        if (scales[i] != 0) entries.push_back({adapters[i], scales[i]});
      }
      return entries.empty() ? AdapterMix{} : patched(model, std::move(entries));
    };
    const auto adapters_of = [&](Model& model) {
      return std::vector{sparse_adapter(model, small, 1), sparse_adapter(model, small, 2),
                         sparse_adapter(model, small, 3)};
    };
    std::vector<std::vector<float>> fresh;
    for (const auto& scales : kScales) {
      Model model(make_runtime(), path, {});
      fresh.push_back(all_logits(model, tokens, mix_of(model, adapters_of(model), scales)));
      CHECK(std::count(fresh.begin(), fresh.end(), fresh.back()) == 1);
    }
    ModelOptions options;
    options.adapter_bytes = 4 << 20;
    options.parallel = 4;
    std::mt19937 random(11);
    Model paged(make_runtime(minimum(path, options, 2) + (8 << 10), 2), path, options);
    CHECK_FALSE(paged.plan().resident());
    Model whole(make_runtime(1 << 30, 2), path, options);
    for (Model* model : {&paged, &whole}) {
      const auto adapters = adapters_of(*model);
      std::vector<AdapterMix> mixes;
      for (const auto& scales : kScales) mixes.push_back(mix_of(*model, adapters, scales));
      for (int turn = 0; turn < 125; ++turn) {
        const std::size_t i = random() % mixes.size();
        switch (random() % 5) {
          case 0:
            model->use(mixes[i].patch);
            break;
          case 1:
            if (mixes[i].patch != nullptr) model->remove(mixes[i].patch);
            break;
          case 2:  // compiled anew
            mixes[i] = mix_of(*model, adapters, kScales[i]);
            break;
          default:
            CHECK(all_logits(*model, tokens, mixes[i]) == fresh[i]);
        }
      }
      CHECK(model->check_weights() > 10);
      for (std::size_t i = 0; i < mixes.size(); ++i) CHECK(all_logits(*model, tokens, mixes[i]) == fresh[i]);
      model->check_weights();
      if (model == &paged) CHECK(model->statistics().experts.evictions > 100);
    }
  }
}

TEST_CASE("sequences of several sets share a step, and each has its own weights") {
  const TemporaryDirectory directory;
  const SmallModel small;
  Model model(make_runtime(1 << 30, 2), test::write_small_bundle(directory.path(), small), {0, 4, 16, {}});
  const auto one = sparse_adapter(model, small, 1), two = sparse_adapter(model, small, 2);
  const std::vector<AdapterMix> mixes = {
      {}, patched(model, {{one, 1}}), patched(model, {{two, 1}}), {{{one, 1}}, nullptr}};
  test::check_shared_step(model, mixes, small.vocab);
  CHECK(mixes[1].fingerprint() != mixes[3].fingerprint());
}

TEST_CASE("what no patch covers is added to products: other formats, and values without remainders") {
  const TemporaryDirectory directory;
  const SmallModel small = with_formats({"nl4"}, "f32");
  Model model(make_runtime(), test::write_small_bundle(directory.path(), small), {});
  const auto tokens = some_tokens(7, small.vocab);
  const AdapterMix floats = patched(model, {{sparse_adapter(model, small, 1), 1}});
  CHECK(floats.patch->covered() == 0);
  CHECK(floats.patch->left() > 0);
  CHECK(all_logits(model, tokens, floats) == all_logits(model, tokens, {floats.entries, nullptr}));
  const SmallModel integers;
  Model other(make_runtime(), test::write_small_bundle(directory.path(), integers), {});
  const AdapterMix unknown = patched(other, {{sparse_adapter(other, integers, 1, false), 1}});
  CHECK(unknown.patch->covered() == 0);
  CHECK(all_logits(other, tokens, unknown) == all_logits(other, tokens, {unknown.entries, nullptr}));
}

TEST_CASE(
    "patches are charged, free once removed and let go, and outlive neither their use nor a sequence's") {
  const TemporaryDirectory directory;
  const SmallModel small;
  const auto runtime = make_runtime();
  Model model(runtime, test::write_small_bundle(directory.path(), small), {});
  const auto tokens = some_tokens(9, small.vocab);
  const auto plain = all_logits(model, tokens, {});
  const auto adapter = sparse_adapter(model, small, 1);
  all_logits(model, tokens, {{{adapter, 1}}});  // which takes scratch
  const std::uint64_t before = runtime->budget()->used_bytes();
  AdapterMix mix = patched(model, {{adapter, 1}});
  CHECK(runtime->budget()->used_bytes() >= before + mix.patch->bytes());
  const auto expected = all_logits(model, tokens, mix);
  auto sequence = model.sequence(mix);
  model.remove(mix.patch);
  mix = {};
  CHECK(all_logits(model, *sequence, tokens) == expected);
  model.remove(sequence->mix()->patch);
  sequence.reset();
  CHECK(runtime->budget()->used_bytes() == before);
  CHECK(all_logits(model, tokens, {}) == plain);
}

TEST_CASE("a patch belongs to its adapters at their scales") {
  const TemporaryDirectory directory;
  const SmallModel small;
  Model model(make_runtime(), test::write_small_bundle(directory.path(), small), {});
  const auto one = sparse_adapter(model, small, 1);
  AdapterMix mix = patched(model, {{one, 1}});
  mix.entries[0].scale = 0.5F;
  CHECK(contains(error_of(ErrorKind::invalid_argument, [&] { model.sequence(mix); }), "patches"));
}
