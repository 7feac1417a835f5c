// The choice of experts and their weights, against values worked out by hand.
#include "model/router.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "support.h"

namespace edgert {
namespace {

struct Choice {
  std::vector<std::int32_t> experts;
  std::vector<float> weights;
};

Choice route(const RouterRecipe& recipe, int per_token, std::vector<float> logits,
             const std::vector<float>& bias = {}, std::vector<std::int32_t> imposed = {}) {
  FfnRecipe ffn;
  ffn.num_experts = static_cast<int>(logits.size());
  ffn.num_experts_per_tok = per_token;
  ffn.router = recipe;
  std::vector<float> space(router_space(ffn), std::numeric_limits<float>::quiet_NaN());
  Choice choice{std::vector<std::int32_t>(static_cast<std::size_t>(per_token)),
                std::vector<float>(static_cast<std::size_t>(per_token))};
  const RouterRow row{.logits = logits,
                      .selection_bias = bias.empty() ? nullptr : bias.data(),
                      .expert_scale = nullptr,
                      .space = space,
                      .experts = choice.experts,
                      .weights = choice.weights};
  choose_row(kernels("scalar"), recipe, row, imposed);
  weigh_row(kernels("scalar"), recipe, row);
  return choice;
}

float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

void check_weights(const Choice& choice, const std::vector<float>& expected) {
  REQUIRE(choice.weights.size() == expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i)
    CHECK(choice.weights[i] == doctest::Approx(expected[i]).epsilon(1e-6));
}

using Ids = std::vector<std::int32_t>;

TEST_CASE("softmax over all, and over the chosen") {
  const std::vector<float> logits = {0, std::log(3.0F), std::log(2.0F), std::log(4.0F)};
  RouterRecipe recipe;
  check_weights(route(recipe, 2, logits), {0.3F, 0.4F});
  recipe.normalize = true;
  recipe.scale = 7;
  const Choice choice = route(recipe, 2, logits);
  CHECK(choice.experts == Ids{1, 3});
  check_weights(choice, {3, 4});
}

TEST_CASE("of equal experts the lower id is chosen") {
  CHECK(route({}, 3, {1, 2, 2, 2, 2}).experts == Ids{1, 2, 3});
}

TEST_CASE("sigmoid chooses by the logit, which it does not saturate") {
  RouterRecipe recipe;
  recipe.scoring = Scoring::sigmoid;
  const Choice choice = route(recipe, 1, {40, 90, 60});
  CHECK(choice.experts == Ids{1});
  check_weights(choice, {1});
}

TEST_CASE("a selection bias chooses and does not weigh") {
  RouterRecipe recipe;
  recipe.scoring = Scoring::sigmoid;
  recipe.bias = RouterBias::selection;
  const Choice choice = route(recipe, 2, {-1, 1, 2, 0}, {5, 0, -5, 0.1F});
  CHECK(choice.experts == Ids{0, 1});
  check_weights(choice, {sigmoid(-1), sigmoid(1)});
  recipe.normalize = true;
  recipe.norm_epsilon = 0.5F;
  const float sum = sigmoid(-1) + sigmoid(1) + 0.5F;
  check_weights(route(recipe, 2, {-1, 1, 2, 0}, {5, 0, -5, 0.1F}), {sigmoid(-1) / sum, sigmoid(1) / sum});
  recipe.norm_minimum = 4;
  check_weights(route(recipe, 2, {-1, 1, 2, 0}, {5, 0, -5, 0.1F}), {sigmoid(-1) / 4, sigmoid(1) / 4});
}

TEST_CASE("only experts of the best groups are chosen") {
  RouterRecipe recipe;
  recipe.scoring = Scoring::sigmoid;
  recipe.groups = ExpertGroups{.count = 3, .keep = 1, .score = GroupScore::max};
  const std::vector<float> logits = {3, -9, 2, 2, 1, 1};
  CHECK(route(recipe, 2, logits).experts == Ids{0, 1});
  recipe.groups->score = GroupScore::sum_of_top_2;
  CHECK(route(recipe, 2, logits).experts == Ids{2, 3});
  recipe.groups->keep = 2;
  CHECK(route(recipe, 2, {3, -9, 2, 2, 2, 2}).experts == Ids{2, 3});
  CHECK(route(recipe, 2, {1, 1, 1, 1, 1, 1}).experts == Ids{0, 1});  // of equal groups the lower one
  recipe.bias = RouterBias::selection;
  recipe.groups->keep = 1;
  CHECK(route(recipe, 2, logits, {0, 2, 0, 0, 0, 0}).experts == Ids{0, 1});
}

TEST_CASE("the sparsemixer leaves out what is far below the best") {
  RouterRecipe recipe;
  recipe.scoring = Scoring::sparsemixer;
  recipe.jitter = 0.05F;
  // Within a tenth of 2 lies 1.9 alone; within a tenth of 1.9, 1.75.
  const Choice choice = route(recipe, 2, {1, 1.9F, 2, 1.75F});
  CHECK(choice.experts == Ids{1, 2});
  check_weights(choice, {1 / (1 + std::exp(-0.15F)), 1 / (1 + std::exp(-0.1F))});
  const Choice alone = route(recipe, 2, {8, 1, 4, 2});
  CHECK(alone.experts == Ids{0, 2});
  check_weights(alone, {1, 1});
}

TEST_CASE("imposed experts keep the router's weights") {
  RouterRecipe recipe;
  recipe.normalize = true;
  const Choice choice = route(recipe, 2, {0, std::log(3.0F), 5, 5}, {}, {0, 1});
  CHECK(choice.experts == Ids{0, 1});
  check_weights(choice, {0.25F, 0.75F});
}

// --- what a recipe may say ----------------------------------------------------------------------------

Recipe with_router(const std::string& router) {
  const std::string text =
      R"({"version":1,"architecture":"x","hidden_size":8,"vocab_size":8,"context_length":8,)"
      R"("embedding":{"scale":1},"output":{"tied":true,"scale":1},"final_norm_eps":0,"layers":[0],"blocks":[{)"
      R"("norm_eps":0,"residual_scale":1,"mixer":{"kind":"attention","num_heads":1,"num_kv_heads":1,)"
      R"("head_dim":8,"scale":1,"qkv_bias":false,"output_bias":false,"qk_norm":null,"clip_qkv":null,)"
      R"("window":null,"rope":null},"ffn":{"kind":"moe","num_experts":8,"num_experts_per_tok":3,)"
      R"("moe_intermediate_size":8,"activation":"silu","shared":null,"router":{)" +
      router + "}}}]}";
  return parse_recipe(Json::parse(text, "recipe"), "recipe");
}

TEST_CASE("a router's recipe") {
  const std::string plain = R"("normalize":true,"scale":2)";
  CHECK(with_router(plain + R"(,"scoring":"softmax")").blocks[0].ffn.router.bias == RouterBias::none);
  const RouterRecipe router =
      with_router(plain + R"(,"scoring":"sigmoid","bias":"selection","norm_epsilon":1e-20,"weighs":"input",)"
                          R"("groups":{"count":4,"keep":2,"score":"sum_of_top_2"})")
          .blocks[0]
          .ffn.router;
  CHECK(router.scoring == Scoring::sigmoid);
  CHECK(router.groups->keep == 2);
  CHECK(router.weighs_input);
  CHECK(router.norm_epsilon == 1e-20F);

  const auto refused = [&](ErrorKind kind, const std::string& more, const std::string& name) {
    CHECK(test::contains(test::error_of(kind, [&] { with_router(plain + more); }), name));
  };
  refused(ErrorKind::unsupported, R"(,"scoring":"hash")", "scoring: router scoring 'hash'");
  refused(ErrorKind::unsupported, R"(,"scoring":"softmax","bias":"both")", "'both'");
  refused(ErrorKind::unsupported, R"(,"scoring":"softmax","noise":1)", "noise");
  refused(ErrorKind::corrupt, R"(,"scoring":"softmax","norm_epsilon":-1)", "norm_epsilon");
  const std::string groups = R"(,"scoring":"softmax","groups":{"score":"max",)";
  refused(ErrorKind::corrupt, groups + R"("count":3,"keep":1})", "divisor of num_experts");
  refused(ErrorKind::corrupt, groups + R"("count":4,"keep":1})", "num_experts_per_tok = 3");
  refused(ErrorKind::corrupt, groups + R"("count":4,"keep":5})", "keep");
  refused(ErrorKind::corrupt, R"(,"scoring":"sparsemixer","jitter":0.01)", "sparsemixer");
}

}  // namespace
}  // namespace edgert
