// What may be given up for speed: how far a replacement may go, and what is left out.
#include "model/lossy.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <set>
#include <vector>

#include "engine/model.h"
#include "model/router.h"
#include "model_support.h"
#include "small_bundle.h"
#include "support.h"

using namespace edgert;
using test::make_runtime;

namespace {

using Ids = std::vector<std::int32_t>;
using Bytes = std::vector<std::uint8_t>;

std::set<std::int32_t> without(const Ids& ids, const Ids& others) {
  std::set<std::int32_t> left(ids.begin(), ids.end());
  for (const std::int32_t id : others) left.erase(id);
  return left;
}

float value(const std::vector<float>& ranking, std::int32_t id) {
  return ranking[static_cast<std::size_t>(id)];
}

// One row as a recipe's router ranks and chooses it.
struct Routed {
  Routed(const RouterRecipe& recipe, int per_token, const std::vector<float>& values,
         const std::vector<float>& bias)
      : logits(values),
        selection_bias(bias),
        chosen(static_cast<std::size_t>(per_token)),
        weights(chosen.size()) {
    FfnRecipe ffn;
    ffn.num_experts = static_cast<int>(values.size());
    ffn.num_experts_per_tok = per_token;
    ffn.router = recipe;
    space.resize(router_space(ffn));
    choose_row(kernels("scalar"), recipe, row(), {});
    const auto ranked = edgert::ranking(recipe, row());
    ranking.assign(ranked.begin(), ranked.end());
  }
  RouterRow row() {
    return {.logits = logits,
            .selection_bias = selection_bias.empty() ? nullptr : selection_bias.data(),
            .expert_scale = nullptr,
            .space = space,
            .experts = chosen,
            .weights = weights};
  }
  std::vector<float> logits, selection_bias, space, ranking;
  Ids chosen;
  std::vector<float> weights;
};

RouterRecipe grouped_sigmoid() {
  RouterRecipe recipe;
  recipe.scoring = Scoring::sigmoid;
  recipe.bias = RouterBias::selection;
  recipe.groups = ExpertGroups{.count = 4, .keep = 2, .score = GroupScore::sum_of_top_2};
  return recipe;
}

}  // namespace

TEST_CASE("a replacement stays inside its bound, whatever the router") {
  RouterRecipe recipe;
  SUBCASE("softmax") {}
  SUBCASE("sigmoid scores with a bias for selection, in groups") { recipe = grouped_sigmoid(); }
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> share(0, 1);
  constexpr int kExperts = 16, kPerToken = 6;
  for (int round = 0; round < 500; ++round) {
    std::vector<float> logits(kExperts), bias;
    for (float& logit : logits) logit = normal(random);
    if (recipe.groups) {
      for (int e = 0; e < kExperts; ++e) bias.push_back(0.1F * normal(random));
    }
    Bytes at_hand(kExperts);
    for (auto& one : at_hand) one = random() % 2;
    const float lambda = share(random);
    const Routed routed(recipe, kPerToken, logits, bias);
    Ids chosen = routed.chosen;
    const std::size_t replaced = prefer_at_hand(routed.ranking, at_hand, lambda, chosen);

    CHECK(std::is_sorted(chosen.begin(), chosen.end()));
    const auto gone = without(routed.chosen, chosen), come = without(chosen, routed.chosen);
    CHECK(gone.size() == replaced);
    CHECK(come.size() == replaced);
    CHECK(gone.count(first_choice(routed.ranking)) == 0);
    float least = 1e30F, most = -1e30F;
    for (const float v : routed.ranking) {
      if (std::isfinite(v)) least = std::min(least, v);
      most = std::max(most, v);
    }
    const float bound = lambda * (most - least);
    for (const std::int32_t in : come) {
      CHECK(at_hand[static_cast<std::size_t>(in)] == 1);
      CHECK(std::isfinite(value(routed.ranking, in)));  // of a group that can be chosen
      for (const std::int32_t out : gone) {
        CHECK(at_hand[static_cast<std::size_t>(out)] == 0);
        CHECK(value(routed.ranking, out) - value(routed.ranking, in) <= bound);
      }
    }
    // What stays absent has nobody within the bound left to give way to.
    for (const std::int32_t id : chosen) {
      if (at_hand[static_cast<std::size_t>(id)] != 0 || id == first_choice(routed.ranking)) continue;
      for (std::int32_t other = 0; other < kExperts; ++other) {
        const bool free = at_hand[static_cast<std::size_t>(other)] != 0 &&
                          std::find(chosen.begin(), chosen.end(), other) == chosen.end();
        if (free) CHECK(value(routed.ranking, id) - value(routed.ranking, other) > bound);
      }
    }
  }
}

TEST_CASE("nothing is replaced where all is at hand, nothing is, or the bound is zero") {
  const std::vector<float> ranking = {3, 1, 2, 5, 4};
  for (const Bytes& at_hand : {Bytes(5, 1), Bytes(5, 0)}) {
    Ids chosen = {0, 3, 4};
    CHECK(prefer_at_hand(ranking, at_hand, 1, chosen) == 0);
    CHECK(chosen == Ids{0, 3, 4});
  }
  Ids chosen = {0, 3, 4};
  CHECK(prefer_at_hand(ranking, Bytes{0, 1, 1, 0, 0}, 0, chosen) == 0);
}

TEST_CASE("the first choice stays, and the worst of the absent gives way to the best at hand") {
  const std::vector<float> ranking = {3, 1, 2, 5, 4};
  Ids chosen = {0, 3, 4};
  CHECK(prefer_at_hand(ranking, Bytes{0, 1, 1, 0, 0}, 0.25F, chosen) == 1);  // within 1 of 3 lies 2
  CHECK(chosen == Ids{2, 3, 4});
  chosen = {0, 3, 4};
  CHECK(prefer_at_hand(ranking, Bytes{0, 1, 1, 0, 0}, 1, chosen) == 2);
  CHECK(chosen == Ids{1, 2, 3});
}

TEST_CASE("light experts are left out, the heaviest never") {
  const auto skip = [](const LossyModes& modes, const Bytes& at_hand, std::vector<float> weights) {
    Ids experts = {0, 1, 2};
    const std::size_t count = skip_light(modes, at_hand, experts, weights);
    CHECK(count == static_cast<std::size_t>(std::count(experts.begin(), experts.end(), kNoExpert)));
    for (std::size_t n = 0; n < 3; ++n) CHECK((experts[n] == kNoExpert) == (weights[n] == 0));
    return experts;
  };
  const std::vector<float> weights = {0.5F, 1.5F, 3};  // shares of 0.1, 0.3 and 0.6
  CHECK(skip({.skip_experts = 0.09F}, {}, weights) == Ids{0, 1, 2});
  CHECK(skip({.skip_experts = 0.2F}, {}, weights) == Ids{kNoExpert, 1, 2});
  CHECK(skip({.skip_experts = 1}, {}, weights) == Ids{kNoExpert, kNoExpert, 2});
  CHECK(skip({.skip_absent_experts = 0.5F}, {1, 0, 0}, weights) == Ids{0, kNoExpert, 2});
  CHECK(skip({.skip_experts = 0.2F, .skip_absent_experts = 0.5F}, {1, 1, 0}, weights) ==
        Ids{kNoExpert, 1, 2});
}

// --- in a model ---------------------------------------------------------------------------------------

namespace {

constexpr std::uint64_t kEverything = 1 << 30;

test::SmallModel some_model() {
  test::SmallModel small;
  small.experts = 12;
  small.per_token = 4;
  return small;
}

std::vector<float> all_logits(Model& model) { return test::all_logits(model, test::some_tokens(50, 67)); }

ModelOptions options(const LossyModes& modes, int chunk = 1) {
  ModelOptions out;
  out.chunk = chunk;
  out.lossy = modes;
  return out;
}

}  // namespace

TEST_CASE("leaving out light experts keeps the law: a row's result is its own") {
  const test::TemporaryDirectory directory;
  const auto path = test::write_small_bundle(directory.path(), some_model());
  const LossyModes modes{.skip_experts = 0.2F};
  Model exact(make_runtime(kEverything), path, options({}, 64));
  Model whole(make_runtime(kEverything), path, options(modes, 64));
  const auto expected = all_logits(whole);
  CHECK(expected != all_logits(exact));
  const std::uint64_t skipped = whole.statistics().lossy.skipped;
  CHECK(skipped > 0);
  for (const int chunk : {1, 7}) {
    for (const int threads : {1, 3}) {
      const std::uint64_t least =
          Model(make_runtime(kEverything, threads), path, options(modes, chunk)).plan().minimum_bytes;
      Model model(make_runtime(least, threads), path, options(modes, chunk));
      CHECK(all_logits(model) == expected);
      CHECK(model.statistics().lossy.skipped == skipped);
      CHECK(model.statistics().lossy.replaced == 0);
    }
  }
}

TEST_CASE("what depends on the store changes nothing once every expert is in it") {
  const test::TemporaryDirectory directory;
  const auto path = test::write_small_bundle(directory.path(), some_model());
  Model model(make_runtime(kEverything), path, options({}));
  const auto expected = all_logits(model);
  while (model.statistics().experts.resident < model.statistics().experts.total) {
  }
  model.set_lossy({.cache_aware_routing = 1, .skip_absent_experts = 1});
  CHECK(all_logits(model) == expected);
  CHECK(model.statistics().lossy.replaced == 0);
  CHECK(model.statistics().lossy.skipped == 0);
}

TEST_CASE("with little memory, fewer experts are read; turned off while it runs, the bits are exact again") {
  const test::TemporaryDirectory directory;
  const auto path = test::write_small_bundle(directory.path(), some_model());
  Model whole(make_runtime(kEverything), path, options({}));
  const auto expected = all_logits(whole);
  const std::uint64_t least = whole.plan().minimum_bytes + whole.plan().expert_bytes / 4;
  Model exact(make_runtime(least), path, options({}));
  CHECK(all_logits(exact) == expected);
  for (const LossyModes& modes :
       {LossyModes{.cache_aware_routing = 0.3F}, LossyModes{.skip_absent_experts = 0.25F}}) {
    Model model(make_runtime(least), path, options(modes));
    CHECK(all_logits(model) != expected);
    const ModelStatistics s = model.statistics();
    CHECK((modes.cache_aware_routing > 0 ? s.lossy.replaced : s.lossy.skipped) > 0);
    CHECK(s.experts.misses < exact.statistics().experts.misses);
    CHECK(model.lossy() == modes);
    for (const auto& layer : model.last_experts()) {
      CHECK(std::is_sorted(layer.begin(), layer.end()));
      CHECK(layer.front() >= 0);
    }
    model.set_lossy({});
    CHECK(all_logits(model) == expected);
  }
}

TEST_CASE("a first choice of any row of a step gives way to nothing and is left out by nobody") {
  const test::TemporaryDirectory directory;
  const auto path = test::write_small_bundle(directory.path(), some_model());
  // 50 rows of a step have so many first choices that a store without any expert loses little.
  Model together(make_runtime(kEverything), path, options({.skip_absent_experts = 1}, 64));
  all_logits(together);
  Model apart(make_runtime(kEverything), path, options({.skip_absent_experts = 1}, 1));
  all_logits(apart);
  CHECK(together.statistics().lossy.skipped < apart.statistics().lossy.skipped);
}

TEST_CASE("a share outside 0 to 1 is refused by the knob's name") {
  const test::TemporaryDirectory directory;
  const auto path = test::write_small_bundle(directory.path(), {});
  const auto message = test::error_of(ErrorKind::invalid_argument, [&] {
    Model(make_runtime(kEverything), path, options({.skip_experts = 1.5F}));
  });
  CHECK(test::contains(message, "skip_experts: found 1.5"));
  Model model(make_runtime(kEverything), path, {});
  CHECK(test::contains(test::error_of(ErrorKind::invalid_argument,
                                      [&] { model.set_lossy({.cache_aware_routing = std::nanf("")}); }),
                       "cache_aware_routing"));
  CHECK(model.lossy() == LossyModes{});
}
