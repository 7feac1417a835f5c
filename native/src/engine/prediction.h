// The predictor that a model's options name, over its store.
//
// Threads, ownership: see Preloader; weights, profile, pool and kernels must outlive it.
#pragma once

#include <cstdint>
#include <memory>

#include "experts/preloader.h"
#include "model/recipe.h"
#include "model/weights.h"
#include "platform/thread_pool.h"

namespace edgert {

// What a predictor of this kind charges, the routing profile of `profile_bytes` included.
std::uint64_t prediction_bytes(Prediction kind, const Recipe& recipe, std::uint64_t profile_bytes);

class ExpertPrediction {
 public:
  // Error{invalid_argument} where the bundle has no routing profile with what `kind` needs.
  ExpertPrediction(Prediction kind, const Bundle& bundle, const Recipe& recipe, const Weights& weights,
                   ExpertStore& store, ThreadPool& pool, const KernelTable& kernels,
                   const std::shared_ptr<Budget>& budget);

  Prediction kind() const noexcept { return kind_; }                               // not automatic
  Preloader* preloader() noexcept { return preloader_ ? &*preloader_ : nullptr; }  // null: kind none
  const Preloader* preloader() const noexcept { return preloader_ ? &*preloader_ : nullptr; }

 private:
  Prediction kind_;
  std::optional<Charge> charge_;
  std::optional<RoutingProfile> profile_;
  std::optional<Preloader> preloader_;
};

}  // namespace edgert
