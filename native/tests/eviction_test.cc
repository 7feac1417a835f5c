// Each policy against its definition, computed anew from the whole history at every eviction.
#include "experts/eviction.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <tuple>

#include "routing_support.h"
#include "support.h"

namespace edgert {
namespace {

using test::kKinds;
using test::kRows;
using test::random_visits;
using test::Visit;

std::size_t at(int index) { return static_cast<std::size_t>(index); }

// --- definitions --------------------------------------------------------------------------------------

using History = std::vector<Visit>;

bool has(const std::vector<int>& experts, int expert) {
  return std::find(experts.begin(), experts.end(), expert) != experts.end();
}

// The visits of a row that count, oldest first.
std::vector<std::vector<int>> visits_of(const History& history, int row) {
  std::vector<std::vector<int>> visits;
  for (const Visit& visit : history) {
    if (visit.row == row && !visit.scan) visits.push_back(visit.experts);
  }
  return visits;
}

double lfu_worth(const History& history, int row, int expert) {
  double count = 0;
  int seen = 0;
  for (const auto& visit : visits_of(history, row)) {
    if (++seen % 64 == 0) count /= 2;
    count += has(visit, expert);
  }
  return count;
}

double edgemoe_worth(const History& history, int row, int expert) {
  double uses = 0;
  for (const auto& visit : visits_of(history, row)) uses += has(visit, expert);
  const int layers = static_cast<int>(kRows.size());
  const int running = history.back().row;
  int d = 1;
  while ((running + d) % layers != row) ++d;
  return uses / d;
}

constexpr std::array kMemories = {0.0, 0.5, 0.8, 0.95, 0.99};
using Terms = std::array<double, 6>;

// What was computed once.
struct Known {
  std::map<std::tuple<int, std::size_t, int>, Terms> terms;  // by row, visits and expert
  std::map<std::size_t, Terms> weights;                      // by the length of the history
};

// What is known of an expert after `seen` visits of its row.
Terms terms_after(const std::vector<std::vector<int>>& visits, std::size_t seen, int row, int expert,
                  Known& known) {
  const auto [found, fresh] = known.terms.try_emplace({row, seen, expert});
  Terms& terms = found->second;
  if (!fresh) return terms;
  const auto average = [&](double memory, int e) {
    double sum = 0;
    for (std::size_t v = 0; v < seen; ++v) {
      sum += (1 - memory) * std::pow(memory, static_cast<double>(seen - 1 - v)) * has(visits[v], e);
    }
    return sum;
  };
  for (std::size_t i = 0; i < kMemories.size(); ++i) terms[i] = average(kMemories[i], expert);
  double total = 0;
  for (int e = 0; e < kRows[at(row)]; ++e) total += average(0.99, e);
  const auto& last = visits[seen - 1];
  for (const int before : last) {
    double followed = 0;
    double times = 0;
    for (std::size_t v = 0; v + 1 < seen; ++v) {
      if (!has(visits[v], before)) continue;
      ++times;
      followed += has(visits[v + 1], expert);
    }
    const double general = terms[4] * static_cast<double>(last.size()) / total;
    terms[5] += (followed + 8 * general) / (times + 8) / static_cast<double>(last.size());
  }
  return terms;
}

// Solved by elimination of a full matrix.
Terms fitted_weights(const History& history, Known& known) {
  if (const auto found = known.weights.find(history.size()); found != known.weights.end())
    return found->second;
  std::array<std::array<double, 7>, 6> m{};
  std::map<int, std::size_t> seen;
  std::map<int, std::vector<std::vector<int>>> visits;
  for (int row = 0; row < static_cast<int>(kRows.size()); ++row) visits[row] = visits_of(history, row);
  std::array<std::array<double, 7>, 6> sums{};
  int running = 0;
  for (const Visit& visit : history) {
    const bool anew = visit.row <= running;
    running = visit.row;
    if (visit.scan) continue;
    if (anew) {
      for (auto& line : sums) {
        for (double& x : line) x *= 0.995;
      }
      m = sums;
    }
    const std::size_t before = seen[visit.row]++;
    if (before == 0) continue;
    for (int e = 0; e < kRows[at(visit.row)]; ++e) {
      const Terms x = terms_after(visits[visit.row], before, visit.row, e, known);
      for (std::size_t i = 0; i < 6; ++i) {
        for (std::size_t j = 0; j < 6; ++j) sums[i][j] += x[i] * x[j];
        sums[i][6] += x[i] * has(visit.experts, e);
      }
    }
  }
  for (std::size_t i = 0; i < 6; ++i) {
    m[i][i] += 50;
    m[i][6] += i < 5 ? 50 * 0.2 : 0;
  }
  for (std::size_t i = 0; i < 6; ++i) {
    for (std::size_t k = 0; k < 6; ++k) {
      if (k == i) continue;
      const double factor = m[k][i] / m[i][i];
      for (std::size_t j = 0; j < 7; ++j) m[k][j] -= factor * m[i][j];
    }
  }
  Terms weights{};
  for (std::size_t i = 0; i < 6; ++i) weights[i] = m[i][6] / m[i][i];
  return known.weights[history.size()] = weights;
}

// The likelihoods of a row stand as they were computed at its last visit that counts.
double forecast_worth(const History& history, int row, int expert, Known& known) {
  const auto last =
      std::find_if(history.rbegin(), history.rend(), [&](const Visit& v) { return v.row == row && !v.scan; });
  if (last == history.rend()) return 0;
  const History then(history.begin(), last.base());
  const auto visits = visits_of(then, row);
  const Terms weights = fitted_weights(then, known);
  const Terms terms = terms_after(visits, visits.size(), row, expert, known);
  const int layers = static_cast<int>(kRows.size());
  int d = 0;
  while ((history.back().row + 1 + d) % layers != row) ++d;
  const double likelihood = std::inner_product(terms.begin(), terms.end(), weights.begin(), 0.0);
  return std::max(0.0, likelihood) * (1 - 0.5 * d / layers);
}

double worth(Eviction kind, const History& history, int row, int expert, Known& known) {
  switch (kind) {
    case Eviction::lru:
      return 0;  // of equals, the one used longest ago
    case Eviction::lfu:
      return lfu_worth(history, row, expert);
    case Eviction::edgemoe:
      return edgemoe_worth(history, row, expert);
    case Eviction::forecast:
      return forecast_worth(history, row, expert, known);
  }
  return 0;
}

// --- the policies beside them -------------------------------------------------------------------------

std::pair<int, int> place(int entry) {
  int row = 0;
  while (entry >= kRows[at(row)]) entry -= kRows[at(row++)];
  return {row, entry};
}

struct Resident {
  bool passing;
  int stamp;
};

// Whether `victim` is what the definition would evict; likelihoods are rounded, so nearly equal ones may
// swap.
bool goes_first(Eviction kind, const History& history, const std::map<int, Resident>& resident,
                const std::set<int>& pinned, int victim, Known& known) {
  const Resident& chosen = resident.at(victim);
  const auto worth_of = [&](int entry) {
    const auto [row, expert] = place(entry);
    return worth(kind, history, row, expert, known);
  };
  const double least = chosen.passing ? 0 : worth_of(victim);
  for (const auto& [entry, state] : resident) {
    if (entry == victim || pinned.count(entry) != 0) continue;
    if (state.passing != chosen.passing) {
      if (state.passing) return false;
      continue;
    }
    if (state.passing) {
      if (state.stamp > chosen.stamp) return false;
      continue;
    }
    const double other = worth_of(entry);
    const double slack = kind == Eviction::forecast ? 1e-5 : 0;
    if (other < least - slack) return false;
    if (slack == 0 && other == least && state.stamp < chosen.stamp) return false;
  }
  return true;
}

TEST_CASE("each policy evicts what its definition says, never what is pinned") {
  constexpr std::size_t kSlots = 9;
  for (const Eviction kind : kKinds) {
    CAPTURE(name(kind));
    const auto policy = make_policy(kind, kRows);
    const std::vector<Visit> visits = random_visits(150, 7);
    History history;
    std::map<int, Resident> resident;
    Known known;
    int clock = 0;
    int evictions = 0;
    for (const Visit& visit : visits) {
      const int first = std::accumulate(kRows.begin(), kRows.begin() + visit.row, 0);
      std::set<int> pinned;
      const auto touch = [&](int entry) {
        visit.scan ? policy->passed(entry) : policy->used(entry);
        if (visit.scan && resident.count(entry) != 0) return;
        resident[entry] = {visit.scan, ++clock};
      };
      for (const int expert : visit.experts) {
        if (resident.count(first + expert) == 0) continue;
        pinned.insert(first + expert);
        touch(first + expert);
      }
      policy->visited(visit.row, visit.experts, visit.scan);
      history.push_back(visit);
      for (const int expert : visit.experts) {
        const int entry = first + expert;
        if (resident.count(entry) != 0) continue;
        if (resident.size() == kSlots) {
          const int victim = policy->victim([&](int e) { return pinned.count(e) == 0; });
          REQUIRE(resident.count(victim) == 1);
          REQUIRE(pinned.count(victim) == 0);
          REQUIRE(goes_first(kind, history, resident, pinned, victim, known));
          policy->removed(victim);
          resident.erase(victim);
          ++evictions;
        }
        touch(entry);
        pinned.insert(entry);
      }
    }
    CHECK(evictions > 300);
    CHECK(policy->victim([](int) { return false; }) == -1);
  }
}

TEST_CASE("what a predictor expects stays until its row was visited") {
  const auto policy = make_policy(Eviction::forecast, kRows);
  const auto all = [](int) { return true; };
  for (int pass = 0; pass < 3; ++pass) {
    for (int row = 0; row < 3; ++row) policy->visited(row, std::array{0, 1}, false);
  }
  policy->used(0);  // in use at every visit
  policy->used(4);  // never
  CHECK(policy->victim(all) == 4);
  policy->expected(0, std::array{0.1F, 0.0F, 0.0F, 0.0F, 0.9F});
  CHECK(policy->victim(all) == 0);
  policy->visited(0, std::array{0, 1}, false);
  CHECK(policy->victim(all) == 4);
}

TEST_CASE("a word that names no policy is refused with those that do") {
  CHECK(eviction("edgemoe") == Eviction::edgemoe);
  CHECK(
      test::contains(test::error_of(ErrorKind::invalid_argument, [] { eviction("fifo"); }), "forecast, lru"));
}

// --- room for experts of several sizes ----------------------------------------------------------------

TEST_CASE("room is made without evicting anything in vain") {
  std::mt19937 draw(3);
  for (int round = 0; round < 200; ++round) {
    const auto policy = make_lru(12);
    std::vector<std::uint64_t> sizes;
    std::uint64_t spare = 0;
    for (int entry = 0; entry < 12; ++entry) {
      sizes.push_back(1 + draw() % 9);
      policy->used(entry);
      if (entry % 3 != 0) spare += sizes.back();
    }
    const std::uint64_t wanted = 1 + draw() % 50;
    const auto size = [&](int entry) { return sizes[at(entry)]; };
    const auto victims = choose_victims(*policy, wanted, size, [](int entry) { return entry % 3 != 0; });
    CHECK(victims.has_value() == (wanted <= spare));
    if (!victims) continue;
    std::uint64_t freed = 0;
    for (const int entry : *victims) freed += size(entry);
    CHECK(freed >= wanted);
    for (const int entry : *victims) {
      CHECK(entry % 3 != 0);
      CHECK(freed - size(entry) < wanted);
    }
    CHECK(std::set<int>(victims->begin(), victims->end()).size() == victims->size());
  }
}

TEST_CASE("a heavy victim spares the light ones before it") {
  const auto policy = make_lru(4);
  for (int entry = 0; entry < 4; ++entry) policy->used(entry);
  const std::array<std::uint64_t, 4> sizes = {2, 3, 8, 1};
  const auto size = [&](int entry) { return sizes[at(entry)]; };
  const auto any = [](int) { return true; };
  CHECK(choose_victims(*policy, 8, size, any) == std::vector{2});
  CHECK(choose_victims(*policy, 10, size, any) == std::vector{0, 2});
  CHECK(choose_victims(*policy, 5, size, any) == std::vector{0, 1});
  CHECK_FALSE(choose_victims(*policy, 15, size, any).has_value());
}

}  // namespace
}  // namespace edgert
