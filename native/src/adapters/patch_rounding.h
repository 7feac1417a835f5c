// What patches make of codes: the nearest to each with what it lacks and its delta (patch.h).
//
// Threads: values. REQUIRES a format that takes patches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "adapters/patch.h"
#include "adapters/tile_codes.h"
#include "quant/lanes.h"

namespace edgert {

inline constexpr float kRemainderStep = 1.0F / 200;  // of a code

// Values of a tile that are rounded together.
struct Batch {
  static constexpr std::size_t kMost = 128;
  std::size_t count = 0;
  std::uint32_t places[kMost];
  float deltas[kMost];
  float remainders[kMost];
  float codes[kMost];
  float scales[kMost];
  std::int32_t changes[kMost];  // code XOR code'

  // Reads codes and scales.
  void gather(const auto& tile_codes, const Scales& tile_scales) noexcept {
    for (std::size_t i = 0; i < count; ++i)
      codes[i] = static_cast<float>(tile_codes.get(places[i] / kTileRows, places[i] % kTileRows));
    for (std::size_t i = count; i % kLanes != 0; ++i) deltas[i] = remainders[i] = codes[i] = scales[i] = 0;
    tile_scales.gather(places, count, scales);
  }
};

// A sum of squares.
class Squares {
 public:
  void add(Lanes x) noexcept {
    const Pair low = __builtin_convertvector(__builtin_shufflevector(x, x, 0, 1), Pair);
    const Pair high = __builtin_convertvector(__builtin_shufflevector(x, x, 2, 3), Pair);
    sums_ += low * low + high * high;
  }
  double sum() const noexcept { return sums_[0] + sums_[1]; }

 private:
  using Pair = double __attribute__((vector_size(16)));
  Pair sums_{};
};

// The codes that are nearest to those of a batch with what they lack and their deltas.
class Rounding {
 public:
  explicit Rounding(const Format& format) noexcept
      : lowest_(lanes(format.zero == ZeroType::none ? 1 : 0)),  // which leaves code 0 unused, as packing does
        highest_(lanes(static_cast<float>((1U << format.bits) - 1))) {}

  void operator()(Batch& batch) noexcept {
    values_ += batch.count;
    for (std::size_t i = 0; i < batch.count; i += kLanes) {
      const Lanes code = load(batch.codes + i), scale = load(batch.scales + i);
      const Lanes delta = load(batch.deltas + i), remainder = load(batch.remainders + i);
      const IntLanes live = scale != lanes(0);
      const Lanes exact = code + (remainder + delta / (live ? scale : lanes(1)));
      const Lanes nearest = clamp(exact, min(lowest_, code), highest_);
      const Lanes changed = live ? round(nearest) : code;
      const IntLanes change =
          __builtin_convertvector(code, IntLanes) ^ __builtin_convertvector(changed, IntLanes);
      std::memcpy(batch.changes + i, &change, sizeof change);
      clamped_ -= live & (abs(exact - nearest) > lanes(0.5F));
      changed_ -= change != IntLanes{};
      intended_.add(delta);
      error_.add(scale * (changed - code) - delta);
      apart_.add(scale * (exact - changed));
      beside_.add(scale * remainder);
    }
  }

  PatchCounts counts() const noexcept {
    const auto sum = [](const auto& of) { return (of[0] + of[1]) + (of[2] + of[3]); };
    return {values_,
            values_ - static_cast<std::uint64_t>(sum(changed_)),
            static_cast<std::uint64_t>(sum(clamped_)),
            intended_.sum(),
            error_.sum(),
            apart_.sum(),
            beside_.sum()};
  }

 private:
  static Lanes load(const float* from) noexcept {
    Lanes v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }
  const Lanes lowest_;
  const Lanes highest_;
  std::uint64_t values_ = 0;
  IntLanes changed_{};  // of a tile: few enough
  IntLanes clamped_{};
  Squares intended_, error_, apart_, beside_;
};

}  // namespace edgert
