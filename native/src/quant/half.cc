// Conversions by integer arithmetic alone: the same on every processor, whatever its treatment of denormals.
#include <bit>

#include "quant/pack.h"

namespace edgert {

namespace {
constexpr std::uint32_t kMagnitude = 0x7fffffffU;
constexpr std::uint32_t kInfinity = 0x7f800000U;
constexpr std::uint32_t kHalfBias = (127U - 15U) << 23;  // from the exponent bias of half to that of float
constexpr std::uint32_t kHalfMinNormal = (127U - 14U) << 23;  // 2^-14
constexpr std::uint32_t kHalfOverflow = 0x477ff000U;          // 65520, halfway past the largest half
}  // namespace

float half_to_float(std::uint16_t bits) noexcept {
  const std::uint32_t sign = (bits & 0x8000U) << 16;
  const std::uint32_t magnitude = (bits & 0x7fffU) << 13;
  if (magnitude >= kHalfMinNormal - kHalfBias) {
    const bool special = magnitude >= (0x7c00U << 13);
    return std::bit_cast<float>(sign | (magnitude + (special ? 2 * kHalfBias : kHalfBias)));
  }
  const float subnormal = static_cast<float>(bits & 0x3ffU) * 0x1p-24F;
  return sign != 0 ? -subnormal : subnormal;
}

std::uint16_t float_to_half(float value) noexcept {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000U;
  const std::uint32_t magnitude = bits & kMagnitude;
  std::uint32_t half = 0;
  if (magnitude > kInfinity) {
    half = 0x7e00U;
  } else if (magnitude >= kHalfOverflow) {
    half = 0x7c00U;
  } else if (magnitude >= kHalfMinNormal) {
    half = (magnitude - kHalfBias + 0xfffU + ((magnitude >> 13) & 1U)) >> 13;
  } else {
    // 0.5 + x has a unit in the last place of 2^-24, that of a subnormal half.
    half = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5F) -
           std::bit_cast<std::uint32_t>(0.5F);
  }
  return static_cast<std::uint16_t>(sign | half);
}

float bfloat_to_float(std::uint16_t bits) noexcept {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

std::uint16_t float_to_bfloat(float value) noexcept {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & kMagnitude) > kInfinity) return static_cast<std::uint16_t>((bits >> 16) | 0x40U);
  return static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

}  // namespace edgert
