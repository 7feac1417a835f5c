// Four floats that compute as one: the baseline vector of x86-64 and AArch64. Every operation rounds as IEEE
// 754 says, so the two give the same bits.
#pragma once

#include <cstdint>

namespace edgert {

inline constexpr int kLanes = 4;
using Lanes = float __attribute__((vector_size(16)));
using IntLanes = std::int32_t __attribute__((vector_size(16)));

inline Lanes lanes(float x) { return Lanes{x, x, x, x}; }
inline Lanes min(Lanes a, Lanes b) { return a < b ? a : b; }
inline Lanes max(Lanes a, Lanes b) { return a > b ? a : b; }
inline Lanes clamp(Lanes x, Lanes lowest, Lanes highest) { return min(max(x, lowest), highest); }
inline Lanes abs(Lanes x) { return max(x, -x); }

// To the nearest integer, ties to even; REQUIRES |x| < 2^22.
inline Lanes round(Lanes x) {
  const Lanes magic = lanes(0x1.8p23F);
  return (x + magic) - magic;
}

}  // namespace edgert
