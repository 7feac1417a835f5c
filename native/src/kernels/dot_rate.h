// The int8 dot product alone, from registers: what the instruction set can do at most. For measuring.
#pragma once

#include "kernels/vector.h"

namespace edgert {

// `rounds` rounds of as many independent sums as a matrix kernel would block for; returns the multiply-adds
// done.
template <class V>
std::uint64_t dot_rounds(std::uint64_t rounds) {
  constexpr int kCodes = V::kRegisters == 32 ? 4 : 2, kInputs = 4;
  alignas(64) std::uint32_t memory[(kCodes + kInputs) * V::kWidth] = {};
  typename V::Int sums[kCodes][kInputs] = {};
  for (std::uint64_t round = 0; round < rounds; ++round) {
    asm volatile(""
                 :
                 : "r"(memory)
                 : "memory");  // operands may be new, so no product can be kept from before
#pragma GCC unroll 4
    for (int i = 0; i < kInputs; ++i) {
      const auto x = V::template load_raw<typename V::Bits>(memory + (kCodes + i) * V::kWidth);
#pragma GCC unroll 4
      for (int c = 0; c < kCodes; ++c) {
        const auto codes = V::template load_raw<typename V::Bits>(memory + c * V::kWidth);
        sums[c][i] = V::dot_peak(sums[c][i], codes, x);
      }
    }
  }
  typename V::Int sum{};
#pragma GCC unroll 4
  for (int i = 0; i < kInputs; ++i) {
#pragma GCC unroll 4
    for (int c = 0; c < kCodes; ++c) sum += sums[c][i];
  }
  __builtin_memcpy(memory, &sum, sizeof sum);
  asm volatile("" : : "r"(memory) : "memory");
  return rounds * kCodes * kInputs * V::kPeakProducts;
}

}  // namespace edgert
