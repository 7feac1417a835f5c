// Random visits to the experts of a few rows.
#pragma once

#include <algorithm>
#include <array>
#include <random>
#include <set>
#include <vector>

#include "experts/eviction.h"

namespace edgert::test {

inline constexpr std::array kKinds = {Eviction::lru, Eviction::lfu, Eviction::edgemoe, Eviction::forecast};
inline const std::vector<int> kRows = {5, 8, 6};

struct Visit {
  int row;
  std::vector<int> experts;
  bool scan;
};

// Some experts more often than others, or the neighbours of the last ones; now and then most of a row.
inline std::vector<Visit> random_visits(int passes, unsigned seed) {
  std::mt19937 draw(seed);
  std::vector<Visit> visits;
  for (int pass = 0; pass < passes; ++pass) {
    const bool scan = draw() % 9 == 0;
    for (int row = 0; row < static_cast<int>(kRows.size()); ++row) {
      const auto count = static_cast<unsigned>(kRows[static_cast<std::size_t>(row)]);
      std::set<int> experts;
      if (!scan && pass > 0 && draw() % 2 == 0) {
        for (const int before : visits[visits.size() - kRows.size()].experts) {
          if (experts.size() < 2) experts.insert((before + 1) % kRows[static_cast<std::size_t>(row)]);
        }
      }
      while (experts.size() < (scan ? count - 1 : 2)) {
        experts.insert(static_cast<int>(std::min(draw() % count, draw() % count)));
      }
      visits.push_back({row, {experts.begin(), experts.end()}, scan});
    }
  }
  return visits;
}

}  // namespace edgert::test
