// The simulated store: against the real one, and its optimum against everything.
#include "experts/simulation.h"

#include <doctest/doctest.h>

#include <random>
#include <set>

#include "routing_support.h"
#include "store_support.h"
#include "support.h"

namespace edgert {
namespace {

using test::kKinds;
using test::kRows;
using test::random_visits;
using test::Visit;

using Sizes = std::vector<std::vector<std::uint64_t>>;

Sizes equal_sizes() {
  Sizes sizes;
  for (const int count : kRows) sizes.emplace_back(static_cast<std::size_t>(count), 1);
  return sizes;
}

std::vector<RoutedStep> steps_of(const std::vector<Visit>& visits) {
  std::vector<RoutedStep> steps;
  for (std::size_t i = 0; i < visits.size(); ++i) {
    if (i % kRows.size() == 0) steps.emplace_back();
    steps.back().push_back(visits[i].experts);
  }
  return steps;
}

TEST_CASE("a scan leaves in place what was there") {
  for (const Eviction kind : kKinds) {
    CAPTURE(name(kind));
    StoreSimulation store(equal_sizes(), 13, kind);
    const RoutedStep own = {{1, 3}, {0, 5}, {2, 4}};
    const RoutedStep scan = {{0, 1, 2, 3, 4}, {0, 1, 2, 3, 4, 5, 6}, {0, 1, 2, 3, 4, 5}};
    store.run({own, own, scan, scan});
    const StoreSimulation::Counts after = store.run({own});
    CHECK(after.hits == 6);
    CHECK(after.misses == 0);
  }
}

// The fewest misses of one row of single experts, by trying everything.
int fewest_misses(const std::vector<int>& uses, std::size_t from, const std::set<int>& resident,
                  std::size_t slots) {
  if (from == uses.size()) return 0;
  if (resident.count(uses[from]) != 0) return fewest_misses(uses, from + 1, resident, slots);
  std::set<int> with = resident;
  with.insert(uses[from]);
  if (resident.size() < slots) return 1 + fewest_misses(uses, from + 1, with, slots);
  int best = static_cast<int>(uses.size());
  for (const int victim : resident) {
    std::set<int> after = with;
    after.erase(victim);
    best = std::min(best, 1 + fewest_misses(uses, from + 1, after, slots));
  }
  return best;
}

TEST_CASE("the optimum misses as little as can be") {
  std::mt19937 draw(11);
  for (int round = 0; round < 20; ++round) {
    std::vector<int> uses;
    std::vector<RoutedStep> steps;
    for (int i = 0; i < 12; ++i) {
      uses.push_back(static_cast<int>(draw() % 5));
      steps.push_back({{uses.back()}});
    }
    StoreSimulation store(Sizes(1, std::vector<std::uint64_t>(5, 1)), 3, steps);
    CHECK(store.run(steps).misses == static_cast<std::uint64_t>(fewest_misses(uses, 0, {}, 3)));
  }
}

TEST_CASE("no policy beats the optimum where experts weigh the same") {
  for (unsigned seed = 0; seed < 20; ++seed) {
    const auto steps = steps_of(random_visits(80, seed));
    for (const std::uint64_t slots : {8, 11, 15}) {
      const auto least = StoreSimulation(equal_sizes(), slots, steps).run(steps).misses;
      for (const Eviction kind : kKinds) {
        CHECK(least <= StoreSimulation(equal_sizes(), slots, kind).run(steps).misses);
      }
    }
  }
}

TEST_CASE("a simulation refuses steps of another model and a future that does not come") {
  StoreSimulation store(equal_sizes(), 9, Eviction::lru);
  const auto refused = [&](const RoutedStep& step) {
    return test::error_of(ErrorKind::invalid_argument, [&] { store.run({step}); });
  };
  CHECK(test::contains(refused({{0}, {0}}), "found 2 rows of experts, allowed 3"));
  CHECK(test::contains(refused({{0}, {8}, {0}}), "row 1: found expert 8, allowed 0 to 7"));
  StoreSimulation optimum(equal_sizes(), 9, std::vector<RoutedStep>{{{0}, {1}, {2}}});
  test::error_of(ErrorKind::invalid_argument, [&] { optimum.run({{{0, 1}, {1}, {2}}}); });
}

TEST_CASE("a simulation counts what the store counts") {
  test::SmallModel model;
  model.hidden = 256;
  model.intermediate = 256;
  for (const auto& formats : {std::vector<std::string>{"int4"}, {"int8", "int2", "int4"}}) {
    model.expert_formats = formats;
    for (const Eviction kind : kKinds) {
      CAPTURE(name(kind));
      CAPTURE(formats.size());
      test::StoreFixture f(8, model, kind);
      Sizes sizes;
      for (const auto& layer : f.bundle.manifest().experts) {
        sizes.emplace_back();
        for (const ExpertEntry& expert : layer.experts)
          sizes.back().push_back(ExpertStore::slot_bytes(expert));
      }
      StoreSimulation simulation(sizes, 8 * f.slot, kind);
      std::mt19937 draw(5);
      std::vector<RoutedStep> steps;
      for (int i = 0; i < 60; ++i) {
        RoutedStep& step = steps.emplace_back();
        for (int layer = 0; layer < 3; ++layer) {
          std::set<int> experts;
          while (experts.size() < (i % 10 == 9 ? 5 : 2))
            experts.insert(static_cast<int>(std::min(draw() % 6, draw() % 6)));
          step.emplace_back(experts.begin(), experts.end());
          f.take_all(layer, step.back());
        }
      }
      const StoreSimulation::Counts counts = simulation.run(steps);
      const ExpertStatistics s = f.store.statistics();
      CHECK(counts.evictions > 30);
      CHECK(counts.hits == s.hits);
      CHECK(counts.misses == s.misses);
      CHECK(counts.evictions == s.evictions);
      CHECK(counts.bytes == s.demand_bytes);
    }
  }
}

}  // namespace
}  // namespace edgert
