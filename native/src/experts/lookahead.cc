#include "experts/lookahead.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace edgert {
namespace {

constexpr float kPriorSeen = 16;      // rows for which the first guess stands in
constexpr float kPriorChosen = 0.5F;  // of the ranks that a token would use
constexpr float kPriorOther = 0.05F;  // and of those behind them
constexpr float kMemory = 4096;       // rows after which older ones count half

std::size_t at(int index) { return static_cast<std::size_t>(index); }

}  // namespace

Lookahead::Lookahead(std::unique_ptr<Predictor> predictor, std::span<const int> rows)
    : predictor_(std::move(predictor)), rows_(rows.begin(), rows.end()) {
  const int most = rows_.empty() ? 0 : *std::max_element(rows_.begin(), rows_.end());
  scores_.resize(at(most));
  probabilities_.resize(at(most));
  order_.reserve(at(most));
}

void Lookahead::routed(const Sight& sight) {
  if (seen_.front() == 0) begin(sight.experts.size());
  if (sight.row > 0) settle(sight.experts);
  order_.clear();
  if (at(sight.row) + 1 < rows_.size()) look(sight);
}

void Lookahead::begin(std::size_t chosen) {
  for (std::size_t rank = 0; rank < kRanks; ++rank) {
    seen_[rank] = kPriorSeen;
    used_[rank] = kPriorSeen * (rank < chosen ? kPriorChosen : kPriorOther);
  }
}

void Lookahead::settle(std::span<const std::int32_t> used) {
  for (std::size_t i = 0; i < order_.size(); ++i) {
    const std::size_t rank = std::min(i, kRanks - 1);
    const bool right = std::find(used.begin(), used.end(), order_[i]) != used.end();
    if (seen_[rank] >= kMemory) {
      seen_[rank] /= 2;
      used_[rank] /= 2;
    }
    seen_[rank] += 1;
    used_[rank] += right ? 1 : 0;
    if (i < used.size()) {
      ++counts_.expected;
      counts_.used += right ? 1 : 0;
    }
  }
}

void Lookahead::look(const Sight& sight) {
  const std::span scores = std::span(scores_).first(at(rows_[at(sight.row) + 1]));
  predictor_->score(sight, scores);
  for (float& score : scores) {
    if (std::isnan(score)) score = -std::numeric_limits<float>::infinity();
  }
  order_.resize(scores.size());
  std::iota(order_.begin(), order_.end(), 0);
  std::sort(order_.begin(), order_.end(), [&](int a, int b) {
    return scores[at(a)] != scores[at(b)] ? scores[at(a)] > scores[at(b)] : a < b;
  });
  for (std::size_t i = 0; i < order_.size(); ++i) {
    const std::size_t rank = std::min(i, kRanks - 1);
    probabilities_[at(order_[i])] = used_[rank] / seen_[rank];
  }
}

}  // namespace edgert
