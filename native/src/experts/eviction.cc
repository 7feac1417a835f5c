#include "experts/eviction.h"

#include <algorithm>
#include <numeric>
#include <string>

#include "experts/ranked.h"
#include "platform/error.h"

namespace edgert {

Eviction eviction(std::string_view word) {
  std::string known;
  for (std::size_t i = 0; i < std::size(kEvictions); ++i) {
    if (kEvictions[i] == word) return static_cast<Eviction>(i);
    known.append(known.empty() ? "" : ", ").append(kEvictions[i]);
  }
  throw Error(ErrorKind::invalid_argument, "eviction: found '" + std::string(word) + "', allowed " + known);
}

std::unique_ptr<EvictionPolicy> make_policy(Eviction kind, std::span<const int> rows) {
  switch (kind) {
    case Eviction::lru:
      break;
    case Eviction::lfu:
      return make_lfu(rows);
    case Eviction::edgemoe:
      return make_edgemoe(rows);
    case Eviction::forecast:
      return make_forecast(rows);
  }
  return make_lru(std::reduce(rows.begin(), rows.end()));
}

std::uint64_t policy_bytes(Eviction kind, std::span<const int> rows) noexcept {
  constexpr std::uint64_t kLinks = 16;  // of an expert in the list of lru
  const auto experts = static_cast<std::uint64_t>(std::reduce(rows.begin(), rows.end()));
  if (kind == Eviction::lru) return experts * kLinks;
  return RankedPolicy::bytes(rows) + (kind == Eviction::forecast ? forecast_bytes(rows) : 0);
}

std::optional<std::vector<int>> choose_victims(EvictionPolicy& policy, std::uint64_t bytes,
                                               const std::function<std::uint64_t(int)>& size,
                                               const Evictable& evictable) {
  std::vector<int> chosen;
  std::uint64_t freed = 0;
  while (freed < bytes) {
    const int entry = policy.victim([&](int candidate) {
      return std::find(chosen.begin(), chosen.end(), candidate) == chosen.end() && evictable(candidate);
    });
    if (entry < 0) return std::nullopt;
    chosen.push_back(entry);
    freed += size(entry);
  }
  // A heavy one that came last may have made lighter ones before it needless; the best of those stay.
  for (auto it = chosen.end(); it != chosen.begin();) {
    --it;
    if (freed - size(*it) < bytes) continue;
    freed -= size(*it);
    it = chosen.erase(it);
  }
  return chosen;
}

}  // namespace edgert
