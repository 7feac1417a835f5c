#include "adapters/gating.h"

#include <algorithm>
#include <cmath>

namespace edgert {
namespace {

constexpr double kEpsilon = 1e-5;  // of a variance

}  // namespace

Standard::Standard(std::span<const float> values) {
  const auto n = static_cast<double>(values.size());
  double sum = 0;
  for (const float x : values) sum += x;
  mean_ = sum / n;
  double squares = 0;
  for (const float x : values) squares += (x - mean_) * (x - mean_);
  scale_ = 1 / std::sqrt(squares / n + kEpsilon);
}

double suits(const float* gate, std::span<const float> x, const Standard& standard) noexcept {
  double sum = 0;
  for (std::size_t i = 0; i < x.size(); ++i) sum += gate[i] * standard.of(x[i]);
  return sum / std::sqrt(static_cast<double>(x.size()));
}

void share(std::span<float> scores, std::size_t top_k) noexcept {
  // Too few to sort: the least of those that are left goes, the last where they are equal.
  auto left = static_cast<std::size_t>(
      std::count_if(scores.begin(), scores.end(), [](float score) { return score > kNoScore; }));
  for (; left > top_k; --left) {
    float* least = nullptr;
    for (float& score : scores) {
      if (score > kNoScore && (least == nullptr || score <= *least)) least = &score;
    }
    *least = kNoScore;
  }
  if (left == 0) {
    std::fill(scores.begin(), scores.end(), 0.0F);
    return;
  }
  const float most = *std::max_element(scores.begin(), scores.end());
  double sum = 0;
  for (const float score : scores) sum += std::exp(static_cast<double>(score) - most);
  for (float& score : scores) score = static_cast<float>(std::exp(static_cast<double>(score) - most) / sum);
}

}  // namespace edgert
