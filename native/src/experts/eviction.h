// Which resident experts go when a slot is needed. One file a policy.
//
// A read takes as long as its expert weighs, and keeping an expert takes the memory that it weighs: what
// keeping it saves for each byte of memory is how likely it is to be used. So policies rank experts by that,
// whatever they weigh, and choose_victims() takes care that no more bytes go than must.
//
// Threads: called by the store with its lock held. Entries are the store's indices: the experts of the first
// row (a layer with routed experts), then those of the second, and so on.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

namespace edgert {

using Evictable = std::function<bool(int entry)>;

class EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;
  // A step asks for these experts of a row; `scan`: for most of the row, as in prefill.
  virtual void visited(int /*row*/, std::span<const int> /*experts*/, bool /*scan*/) {}
  // How likely each expert of a row is to be used at the next visit, as a predictor sees it; holds until
  // then.
  virtual void expected(int /*row*/, std::span<const float> /*probabilities*/) {}
  virtual void used(int entry) = 0;    // asked for, or just read
  virtual void passed(int entry) = 0;  // the same in passing: it goes first, unless it stood there before
  virtual void guessed(int entry) { passed(entry); }  // read because it is likely to be asked for
  virtual void removed(int entry) = 0;                // no longer resident
  // How likely a use at the next visit is, of any entry, and less for one that is far off; none: the policy
  // does not know.
  virtual std::optional<double> likelihood(int /*entry*/) const { return std::nullopt; }
  // The entry to evict among those that `evictable` admits; -1 for none.
  virtual int victim(const Evictable& evictable) = 0;
};

// The knob's words; the first is its default.
enum class Eviction : std::uint8_t { forecast, lru, lfu, edgemoe };
inline constexpr std::string_view kEvictions[] = {"forecast", "lru", "lfu", "edgemoe"};
inline std::string_view name(Eviction kind) noexcept { return kEvictions[static_cast<std::size_t>(kind)]; }
Eviction eviction(std::string_view word);  // Error{invalid_argument} that lists the words

// `rows`: how many experts each has.
std::unique_ptr<EvictionPolicy> make_policy(Eviction kind, std::span<const int> rows);
std::uint64_t policy_bytes(Eviction kind, std::span<const int> rows) noexcept;  // that it takes

// What to evict so that at least `bytes` come free, none of it in vain; nullopt where that cannot be.
std::optional<std::vector<int>> choose_victims(EvictionPolicy& policy, std::uint64_t bytes,
                                               const std::function<std::uint64_t(int entry)>& size,
                                               const Evictable& evictable);

// The policies.
std::unique_ptr<EvictionPolicy> make_lru(int entries);
std::unique_ptr<EvictionPolicy> make_lfu(std::span<const int> rows);
std::unique_ptr<EvictionPolicy> make_edgemoe(std::span<const int> rows);
std::unique_ptr<EvictionPolicy> make_forecast(std::span<const int> rows);
std::uint64_t forecast_bytes(std::span<const int> rows) noexcept;

}  // namespace edgert
