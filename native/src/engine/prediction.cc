#include "engine/prediction.h"

#include "platform/error.h"

namespace edgert {
namespace {

RowRouter router_of(const BlockRecipe& block, const LayerWeights& w) {
  const FfnRecipe& ffn = block.ffn;
  const bool own_norm = ffn.branch_norms;
  return {.weights = w.router.data,
          .bias = ffn.router.bias == RouterBias::logits ? w.router_bias : nullptr,
          .selection_bias = ffn.router.bias == RouterBias::selection ? w.router_bias : nullptr,
          .sigmoid = ffn.router.scoring == Scoring::sigmoid,
          .norm = own_norm ? w.router_norm : w.ffn_norm.weight,
          .norm_bias = own_norm ? nullptr : w.ffn_norm.bias,
          .layer_norm = !own_norm && block.norm == Norm::layer,
          .norm_eps = block.norm_eps};
}

// Beside the profile: scores, ranks and probabilities of what is looked at, and a row of activations.
std::uint64_t working_bytes(const Recipe& recipe) {
  std::size_t most = 0;
  for (const BlockRecipe& block : recipe.blocks)
    most = std::max(most, static_cast<std::size_t>(block.ffn.num_experts));
  return round_up(sizeof(Preloader) + recipe.layers.size() * sizeof(RowRouter) +
                      most * (sizeof(int) + 2 * sizeof(float)) +
                      2 * sizeof(float) * round_up(static_cast<std::size_t>(recipe.hidden_size), kMaxGroup),
                  page_size());
}

bool reads_profile(Prediction kind) {
  return kind == Prediction::automatic || kind == Prediction::dictionary || kind == Prediction::trained;
}

}  // namespace

std::uint64_t prediction_bytes(Prediction kind, const Recipe& recipe, std::uint64_t profile_bytes) {
  if (kind == Prediction::none) return 0;
  return working_bytes(recipe) + (reads_profile(kind) ? profile_bytes : 0);
}

ExpertPrediction::ExpertPrediction(Prediction kind, const Bundle& bundle, const Recipe& recipe,
                                   const Weights& weights, ExpertStore& store, ThreadPool& pool,
                                   const KernelTable& kernels, const std::shared_ptr<Budget>& budget)
    : kind_(kind) {
  PredictorSources sources;
  sources.hidden = recipe.hidden_size;
  sources.pool = &pool;
  sources.kernels = &kernels;
  std::vector<int> layers;
  for (int layer = 0; layer < recipe.num_layers(); ++layer) {
    const BlockRecipe& block = recipe.block(layer);
    if (!block.ffn.is_moe()) continue;
    layers.push_back(layer);
    sources.rows.push_back(block.ffn.num_experts);
    sources.routers.push_back(router_of(block, weights.layer(layer)));
  }
  if (layers.size() < 2) kind_ = Prediction::none;
  if (kind_ == Prediction::none) return;
  if (reads_profile(kind_) && RoutingProfile::find(bundle.manifest()) != nullptr) {
    profile_.emplace(bundle, sources.rows, recipe.hidden_size, budget);
  }
  const auto profiled = [&](RoutingProfile::Part part) { return profile_ && profile_->has(part); };
  if (kind_ == Prediction::automatic) {
    kind_ = profiled(RoutingProfile::correction) ? Prediction::trained : Prediction::router;
  }
  if ((kind_ == Prediction::trained && !profiled(RoutingProfile::correction)) ||
      (kind_ == Prediction::dictionary && !profiled(RoutingProfile::dictionary))) {
    throw Error(ErrorKind::invalid_argument,
                "prefetch: " + std::string(name(kind_)) + " needs a routing profile that has it, and " +
                    bundle.path().string() +
                    " has none: convert with --calibration, or ask for auto, none or router");
  }
  charge_.emplace(budget, working_bytes(recipe), "prediction");
  if (profile_) sources.profile = &*profile_;
  auto predictor = kind_ == Prediction::trained      ? make_trained_lookahead(sources)
                   : kind_ == Prediction::dictionary ? make_dictionary(sources)
                                                     : make_router_lookahead(sources);
  preloader_.emplace(store, Lookahead(std::move(predictor), sources.rows), std::move(layers));
}

}  // namespace edgert
