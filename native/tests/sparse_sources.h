// Sparse values in attention and some experts of a small model; the same numbers for the same seed.
#pragma once

#include <cstdint>
#include <list>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "adapters/adapter.h"
#include "small_bundle.h"

namespace edgert::test {

struct SparseSources {
  struct Numbers {
    std::vector<std::int32_t> rows, cols;
    std::vector<float> values;
    std::vector<std::int8_t> remainders;
  };
  std::list<Numbers> numbers;
  std::vector<AdapterSource> sources;

  SparseSources(const SmallModel& small, unsigned seed, bool with_remainders = true) {
    std::mt19937 random(seed);
    const auto add = [&](const std::string& target, int outputs, int inputs) {
      Numbers& n = numbers.emplace_back();
      std::set<std::pair<int, int>> there;
      for (int i = 0; i < outputs * inputs / 20; ++i) {
        const int row = static_cast<int>(random() % static_cast<unsigned>(outputs));
        const int col = static_cast<int>(random() % static_cast<unsigned>(inputs));
        if (!there.emplace(row, col).second) continue;
        n.rows.push_back(row);
        n.cols.push_back(col);
        n.values.push_back(static_cast<float>(random() % 1000) / 1000 - 0.5F);
        n.remainders.push_back(static_cast<std::int8_t>(static_cast<int>(random() % 200) - 100));
      }
      AdapterSource& source = sources.emplace_back();
      source.target = target;
      source.rows = n.rows;
      source.cols = n.cols;
      source.values = n.values;
      if (with_remainders) source.remainders = n.remainders;
    };
    add("layers.0.attention.o", small.hidden, 32);
    for (int layer = 0; layer < small.layers; ++layer) {
      for (int expert = static_cast<int>(seed % 2); expert < small.experts; ++expert) {
        const std::string name = "layers." + std::to_string(layer) + ".experts." + std::to_string(expert);
        add(name + ".gate", small.intermediate, small.hidden);
        if (expert % 2 == 0) add(name + ".up", small.intermediate, small.hidden);
        add(name + ".down", small.hidden, small.intermediate);
      }
    }
  }
  SparseSources(const SparseSources&) = delete;
  SparseSources& operator=(const SparseSources&) = delete;
};

}  // namespace edgert::test
