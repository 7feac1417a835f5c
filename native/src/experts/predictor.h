// Which experts the next layer will use, as seen from a layer whose router has spoken. One file a predictor.
//
// One layer ahead, and no further: reads that looked two ahead took more time from nearer ones than they
// saved.
//
// A word is only ever a wish: what it costs when wrong is time, never output. Rows are the layers with routed
// experts, in order.
//
// Threads: one step at a time. Ownership: borrows weights, pool and kernels; owns its working memory.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "experts/profile.h"
#include "kernels/kernels.h"
#include "platform/thread_pool.h"

namespace edgert {

// A token where a row's router has spoken.
struct Sight {
  int row = 0;
  std::span<const std::int32_t> experts;  // the router's choice
  const float* residual = nullptr;        // [hidden], what the layer's experts are about to be added to
  const float* router_input = nullptr;    // [hidden], the same as the row's router read it
};

class Predictor {
 public:
  virtual ~Predictor() = default;
  // Scores every expert of the row after `sight.row`, the likelier the higher. Called for every row of a
  // token in order, but the last. REQUIRES one score an expert.
  virtual void score(const Sight& sight, std::span<float> scores) = 0;
};

// The knob's words. automatic: trained where the bundle's routing profile has it, else router.
enum class Prediction : std::uint8_t { automatic, none, dictionary, router, trained };
inline constexpr std::string_view kPredictions[] = {"auto", "none", "dictionary", "router", "trained"};
inline std::string_view name(Prediction kind) noexcept {
  return kPredictions[static_cast<std::size_t>(kind)];
}
Prediction prediction(std::string_view word);  // Error{invalid_argument} that lists the words

// A row's router and the norm in front of it.
struct RowRouter {
  const std::byte* weights = nullptr;  // packed f32 [experts, hidden]
  const float* bias = nullptr;         // [experts] of the logits; null where there is none, as the others
  const float* selection_bias = nullptr;
  bool sigmoid = false;  // scores that the selection bias is added to; else softmax
  const float* norm = nullptr;
  const float* norm_bias = nullptr;
  bool layer_norm = false;
  float norm_eps = 0;
};

// What the predictors may draw on.
struct PredictorSources {
  int hidden = 0;
  std::vector<int> rows;  // how many experts each has
  std::vector<RowRouter> routers;
  const RoutingProfile* profile = nullptr;  // null: none
  ThreadPool* pool = nullptr;
  const KernelTable* kernels = nullptr;
};

// The product of one row, spread over the pool.
void multiply_row(const MatMul& work, ThreadPool& pool, const KernelTable& kernels);
// Turns logits into what the router chooses by, or something of the same order.
void apply_selection(const RowRouter& router, const KernelTable& kernels, std::span<float> logits);

// The predictors. REQUIRES a profile with their part.
std::unique_ptr<Predictor> make_dictionary(const PredictorSources& sources);
std::unique_ptr<Predictor> make_router_lookahead(const PredictorSources& sources);
std::unique_ptr<Predictor> make_trained_lookahead(const PredictorSources& sources);

}  // namespace edgert
