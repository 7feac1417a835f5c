// What may be given up for speed, all of it off unless asked for.
//
// cache_aware_routing: a chosen expert that would have to be read gives way to the best one that need not,
// where their places in the ranking differ by at most this share of the row's spread (largest less smallest).
// The row's first choice stays.
//
// skip_experts, skip_absent_experts: an expert is left out whose weight is below this share of the row's
// weights, at any time or only where it would have to be read. The largest stays; the others' weights are as
// they were.
//
// low_precision_misses: of an expert that would have to be read and whose precision is split, the base alone
// is read, and used, where its weight in every row of the step is below this share of that row's, and never
// the largest. A base that is there already serves such rows too.
//
// What would have to be read depends on the store's state, so but for skip_experts a row's result does not
// depend on that row alone. An expert that is the first choice of a row of the step is read anyway, as a
// whole, and gives way to nothing.
//
// Threads: pure over their arguments.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace edgert {

struct LossyModes {
  float cache_aware_routing = 0;
  float skip_experts = 0;
  float skip_absent_experts = 0;
  float low_precision_misses = 0;

  bool asks_residency() const noexcept {
    return cache_aware_routing > 0 || skip_absent_experts > 0 || low_precision_misses > 0;
  }
  bool operator==(const LossyModes&) const = default;
};

// The knobs of the same names.
struct LossyMode {
  std::string_view knob;
  float LossyModes::* share;
};
inline constexpr std::array kLossyModes{
    LossyMode{"cache_aware_routing", &LossyModes::cache_aware_routing},
    LossyMode{"skip_experts", &LossyModes::skip_experts},
    LossyMode{"skip_absent_experts", &LossyModes::skip_absent_experts},
    LossyMode{"low_precision_misses", &LossyModes::low_precision_misses},
};

// Of a model.
struct LossyCounts {
  std::uint64_t replaced = 0;  // uses of an expert in another's place
  std::uint64_t skipped = 0;
  std::uint64_t low_precision = 0;  // with the base alone
};

inline constexpr std::int32_t kNoExpert = -1;  // in the place of an expert that is left out

// The best of a ranking; of equal ones the lower id.
std::int32_t first_choice(std::span<const float> ranking) noexcept;

// Exchanges experts of `chosen` (ascending ids, the ranking's best) that are not `at_hand`; they stay
// ascending. Returns how many. `at_hand`: by expert, whether it need not be read.
std::size_t prefer_at_hand(std::span<const float> ranking, std::span<const std::uint8_t> at_hand,
                           float largest_share, std::span<std::int32_t> chosen) noexcept;

// Puts kNoExpert and a weight of 0 in the places of those that are left out. Returns how many. `at_hand` may
// be empty where modes.skip_absent_experts is 0.
std::size_t skip_light(const LossyModes& modes, std::span<const std::uint8_t> at_hand,
                       std::span<std::int32_t> experts, std::span<float> weights) noexcept;

// Sets at_hand to 1 where a row needs an expert as a whole: where low_precision_misses does not let it do
// with less.
void need_whole(const LossyModes& modes, std::span<const std::int32_t> experts,
                std::span<const float> weights, std::span<std::uint8_t> at_hand) noexcept;

}  // namespace edgert
