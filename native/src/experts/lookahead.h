// What a predictor's scores are worth: probabilities of use, by how often an expert of that rank was used of
// late.
//
// Threads: one step at a time. Ownership: owns its predictor.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "experts/predictor.h"

namespace edgert {

class Lookahead {
 public:
  struct Counts {
    std::uint64_t expected = 0;  // experts that a token was to use of a row, as many as it uses
    std::uint64_t used = 0;      // of them, those that it did: used / expected is the recall
  };

  // `rows`: how many experts each has.
  Lookahead(std::unique_ptr<Predictor> predictor, std::span<const int> rows);

  // A token's router has spoken: settles what was expected of its row, and looks at the next one. Rows of a
  // token come in order, and every token begins with row 0.
  void routed(const Sight& sight);
  // How likely each expert of the row after the last one is to be used; empty: nobody knows.
  std::span<const float> expected() const noexcept { return {probabilities_.data(), order_.size()}; }
  const Counts& counts() const noexcept { return counts_; }

 private:
  static constexpr std::size_t kRanks = 64;  // those behind share the last one's
  void begin(std::size_t chosen);
  void settle(std::span<const std::int32_t> used);
  void look(const Sight& sight);

  std::unique_ptr<Predictor> predictor_;
  std::vector<int> rows_;
  std::array<float, kRanks> seen_{};  // experts of a rank, and those of them that were used
  std::array<float, kRanks> used_{};
  std::vector<float> scores_;
  std::vector<float> probabilities_;
  std::vector<int> order_;  // experts of the row that is looked at, the likeliest first; empty: of none
  Counts counts_;
};

}  // namespace edgert
