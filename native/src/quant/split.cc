#include "quant/split.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "quant/pack.h"

namespace edgert {
namespace {

struct Pair {
  FormatId whole;
  FormatId base;
};
// The same groups, half the bits.
constexpr Pair kPairs[] = {
    {FormatId::int8, FormatId::q4_1},
    {FormatId::int4, FormatId::affine2},
    {FormatId::int4_32, FormatId::affine2_32},
};

constexpr float kLargestHalf = 65504;
constexpr std::size_t kVectorBytes = 64, kWords = kVectorBytes / sizeof(std::uint64_t);
using Vector = std::array<std::uint64_t, kWords>;

// How the codes of a vector of each half lie in two vectors of the whole; see format.h.
template <unsigned Low>
struct Codes {
  static constexpr std::uint64_t each(unsigned byte) { return 0x0101010101010101U * byte; }
  // Bits [Low * i, Low * i + Low) of a byte of a half, moved to where code i has them, `shift` bits up.
  static void join(const Vector& high, const Vector& low, Vector& first, Vector& second) {
    for (std::size_t w = 0; w < kWords; ++w) {
      const std::uint64_t h = high[w], l = low[w];
      if constexpr (Low == 4) {
        first[w] = (h & each(0x0f)) << 4 | (l & each(0x0f));
        second[w] = (h & each(0xf0)) | (l & each(0xf0)) >> 4;
      } else {
        first[w] = (h & each(0x03)) << 2 | (l & each(0x03)) | (h & each(0x0c)) << 4 | (l & each(0x0c)) << 2;
        second[w] = (h & each(0x30)) >> 2 | (l & each(0x30)) >> 4 | (h & each(0xc0)) | (l & each(0xc0)) >> 2;
      }
    }
  }
  static void split(const Vector& first, const Vector& second, Vector& high, Vector& low) {
    for (std::size_t w = 0; w < kWords; ++w) {
      const std::uint64_t a = first[w], b = second[w];
      if constexpr (Low == 4) {
        high[w] = (a & each(0xf0)) >> 4 | (b & each(0xf0));
        low[w] = (a & each(0x0f)) | (b & each(0x0f)) << 4;
      } else {
        high[w] = (a & each(0x0c)) >> 2 | (a & each(0xc0)) >> 4 | (b & each(0x0c)) << 2 | (b & each(0xc0));
        low[w] = (a & each(0x03)) | (a & each(0x30)) >> 2 | (b & each(0x03)) << 4 | (b & each(0x30)) << 2;
      }
    }
  }
};

Vector load(const std::byte* from) {
  Vector v;
  std::memcpy(v.data(), from, kVectorBytes);
  return v;
}
void store(std::byte* to, const Vector& v) { std::memcpy(to, v.data(), kVectorBytes); }

template <unsigned Low>
void join_codes(const std::byte* high, const std::byte* low, std::byte* codes, std::size_t vectors) {
  for (std::size_t v = 0; v < vectors; ++v) {
    Vector first, second;
    Codes<Low>::join(load(high + v * kVectorBytes), load(low + v * kVectorBytes), first, second);
    store(codes + 2 * v * kVectorBytes, first);
    store(codes + (2 * v + 1) * kVectorBytes, second);
  }
}

template <unsigned Low>
void split_codes(const std::byte* codes, std::byte* high, std::byte* low, std::size_t vectors) {
  for (std::size_t v = 0; v < vectors; ++v) {
    Vector h, l;
    Codes<Low>::split(load(codes + 2 * v * kVectorBytes), load(codes + (2 * v + 1) * kVectorBytes), h, l);
    store(high + v * kVectorBytes, h);
    store(low + v * kVectorBytes, l);
  }
}

std::uint16_t load_half(const std::byte* from) {
  std::uint16_t bits;
  std::memcpy(&bits, from, sizeof bits);
  return bits;
}
void store_half(std::byte* to, std::uint16_t bits) { std::memcpy(to, &bits, sizeof bits); }

// The smallest half that is not below `value`.
std::uint16_t half_above(float value) {
  const std::uint16_t nearest = float_to_half(value);
  if (half_to_float(nearest) >= value) return nearest;
  return static_cast<std::uint16_t>((nearest & 0x8000U) != 0 ? nearest - 1 : nearest + 1);
}

class Split {
 public:
  Split(const Format& whole, std::size_t rows, std::size_t cols)
      : whole_(whole),
        parts_(tile_parts(whole, cols)),
        base_(tile_parts(format(*base_format(whole.id)), cols)),
        low_bits_(static_cast<unsigned>(whole.bits) / 2),
        tiles_((rows + kTileRows - 1) / kTileRows),
        scales_(padded_cols(whole, cols) / static_cast<std::size_t>(whole.group) * kTileRows) {}

  std::size_t refinement_bytes() const { return tiles_ * tile_refinement(); }

  void join(const std::byte* base, const std::byte* refinement, std::byte* packed) const {
    for (std::size_t t = 0; t < tiles_; ++t) {
      const std::size_t vectors = tile_refinement() / kVectorBytes;
      (low_bits_ == 4 ? join_codes<4> : join_codes<2>)(base, refinement, packed, vectors);
      for (std::size_t i = 0; i < scales_; ++i) join_scale(base, packed, i);
      const std::size_t end = whole_.zero == ZeroType::u8 ? parts_.zeros + scales_ : parts_.zeros;
      std::memset(packed + end, 0, parts_.bytes - end);
      base += base_.bytes;
      refinement += tile_refinement();
      packed += parts_.bytes;
    }
  }

  // False where a scale is too large.
  bool split(const std::byte* packed, std::byte* base, std::byte* refinement) const {
    bool fits = true;
    for (std::size_t t = 0; t < tiles_; ++t) {
      const std::size_t vectors = tile_refinement() / kVectorBytes;
      (low_bits_ == 4 ? split_codes<4> : split_codes<2>)(packed, base, refinement, vectors);
      for (std::size_t i = 0; i < scales_; ++i) fits = split_scale(packed, base, i) && fits;
      const std::size_t end = base_.zeros + 2 * scales_;
      std::memset(base + end, 0, base_.bytes - end);
      base += base_.bytes;
      refinement += tile_refinement();
      packed += parts_.bytes;
    }
    return fits;
  }

 private:
  std::size_t tile_refinement() const { return parts_.scales / 2; }
  float steps() const { return static_cast<float>(1U << low_bits_); }

  bool split_scale(const std::byte* packed, std::byte* base, std::size_t i) const {
    const float scale = half_to_float(load_half(packed + parts_.scales + 2 * i));
    const float zero = whole_.zero == ZeroType::u8
                           ? static_cast<float>(std::to_integer<int>(packed[parts_.zeros + i]))
                           : static_cast<float>(1 << (whole_.bits - 1));
    store_half(base + base_.scales + 2 * i, float_to_half(steps() * scale));
    // Rounded up, so that a zero can be told from its neighbours even by the smallest scales.
    const float minimum = scale * (zero - (steps() - 1) / 2);
    store_half(base + base_.zeros + 2 * i, half_above(minimum));
    return std::max(steps() * scale, std::fabs(minimum)) <= kLargestHalf;
  }

  void join_scale(const std::byte* base, std::byte* packed, std::size_t i) const {
    const float scale = half_to_float(load_half(base + base_.scales + 2 * i)) / steps();
    store_half(packed + parts_.scales + 2 * i, float_to_half(scale));
    if (whole_.zero != ZeroType::u8) return;
    const float minimum = half_to_float(load_half(base + base_.zeros + 2 * i));
    // At most half a step above zero - (steps - 1) / 2, so this lies within a quarter of the zero.
    const float zero = minimum / scale + (steps() - 1) / 2 - 0.25F;
    packed[parts_.zeros + i] =
        static_cast<std::byte>(zero > 0 ? static_cast<int>(std::min(zero, 255.0F) + 0.5F) : 0);
  }

  const Format& whole_;
  TileParts parts_;
  TileParts base_;
  unsigned low_bits_;
  std::size_t tiles_;
  std::size_t scales_;  // of a tile
};

}  // namespace

std::optional<FormatId> base_format(FormatId format) noexcept {
  for (const Pair& pair : kPairs) {
    if (pair.whole == format) return pair.base;
  }
  return std::nullopt;
}

std::size_t refinement_bytes(const Format& format, std::size_t rows, std::size_t cols) {
  return Split(format, rows, cols).refinement_bytes();
}

bool split(const Format& format, std::size_t rows, std::size_t cols, std::span<const std::byte> packed,
           std::span<std::byte> base, std::span<std::byte> refinement) {
  const Split planes(format, rows, cols);
  if (!planes.split(packed.data(), base.data(), refinement.data())) return false;
  std::vector<std::byte> again(packed.size());
  planes.join(base.data(), refinement.data(), again.data());
  return std::equal(again.begin(), again.end(), packed.begin());
}

void join(const Format& format, std::size_t rows, std::size_t cols, std::span<const std::byte> base,
          std::span<const std::byte> refinement, std::span<std::byte> packed) {
  Split(format, rows, cols).join(base.data(), refinement.data(), packed.data());
}

}  // namespace edgert
