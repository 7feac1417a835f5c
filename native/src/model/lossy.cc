#include "model/lossy.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace edgert {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::size_t at(std::int32_t expert) noexcept { return static_cast<std::size_t>(expert); }

// Largest less smallest, of what can be chosen.
float spread(std::span<const float> ranking) noexcept {
  float least = kInfinity, most = -kInfinity;
  for (const float value : ranking) {
    if (value == -kInfinity) continue;
    least = std::min(least, value);
    most = std::max(most, value);
  }
  return most - least;
}

// The weights of a row, and which of its experts are light among them.
class Weighed {
 public:
  explicit Weighed(std::span<const float> weights) noexcept : weights_(weights) {
    for (std::size_t n = 0; n < weights.size(); ++n) {
      total_ += std::fabs(weights[n]);
      if (std::fabs(weights[n]) > std::fabs(weights[heaviest_])) heaviest_ = n;
    }
  }
  // Below this share of all; never the heaviest.
  bool light(std::size_t n, float share) const noexcept {
    return n != heaviest_ && std::fabs(weights_[n]) < share * total_;
  }

 private:
  std::span<const float> weights_;
  float total_ = 0;
  std::size_t heaviest_ = 0;
};

bool contains(std::span<const std::int32_t> ids, std::int32_t id) noexcept {
  return std::find(ids.begin(), ids.end(), id) != ids.end();
}

}  // namespace

std::int32_t first_choice(std::span<const float> ranking) noexcept {
  return static_cast<std::int32_t>(std::max_element(ranking.begin(), ranking.end()) - ranking.begin());
}

std::size_t prefer_at_hand(std::span<const float> ranking, std::span<const std::uint8_t> at_hand,
                           float largest_share, std::span<std::int32_t> chosen) noexcept {
  const float bound = largest_share * spread(ranking);
  const std::int32_t first = first_choice(ranking);
  std::size_t replaced = 0;
  while (true) {
    std::int32_t* worst = nullptr;  // of those that would have to be read
    for (std::int32_t& id : chosen) {
      if (id == first || at_hand[at(id)] != 0) continue;
      if (worst == nullptr || ranking[at(id)] <= ranking[at(*worst)]) worst = &id;
    }
    std::int32_t best = kNoExpert;  // of the others that need not
    for (std::size_t e = 0; e < ranking.size(); ++e) {
      const auto id = static_cast<std::int32_t>(e);
      if (at_hand[e] == 0 || ranking[e] == -kInfinity || contains(chosen, id)) continue;
      if (best == kNoExpert || ranking[e] > ranking[at(best)]) best = id;
    }
    if (worst == nullptr || best == kNoExpert || ranking[at(*worst)] - ranking[at(best)] > bound) break;
    *worst = best;
    ++replaced;
  }
  std::sort(chosen.begin(), chosen.end());
  return replaced;
}

std::size_t skip_light(const LossyModes& modes, std::span<const std::uint8_t> at_hand,
                       std::span<std::int32_t> experts, std::span<float> weights) noexcept {
  const Weighed row(weights);
  std::size_t skipped = 0;
  for (std::size_t n = 0; n < weights.size(); ++n) {
    const bool absent = modes.skip_absent_experts > 0 && at_hand[at(experts[n])] == 0;
    if (!row.light(n, std::max(modes.skip_experts, absent ? modes.skip_absent_experts : 0))) continue;
    experts[n] = kNoExpert;
    weights[n] = 0;
    ++skipped;
  }
  return skipped;
}

void need_whole(const LossyModes& modes, std::span<const std::int32_t> experts,
                std::span<const float> weights, std::span<std::uint8_t> at_hand) noexcept {
  const Weighed row(weights);
  for (std::size_t n = 0; n < weights.size(); ++n) {
    if (experts[n] != kNoExpert && !row.light(n, modes.low_precision_misses)) at_hand[at(experts[n])] = 1;
  }
}

}  // namespace edgert
