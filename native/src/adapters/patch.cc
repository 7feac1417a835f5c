#include "adapters/patch.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <utility>

#include "platform/error.h"
#include "quant/pack.h"

namespace edgert {
namespace {

constexpr std::uint32_t kWidestGap = 255;
constexpr float kRemainderStep = 1.0F / 200;

// Changes of a tile's bytes, gathered in nearly the order of their offsets and given out in it.
class Flips {
 public:
  void add(std::size_t offset, unsigned bits) {
    const auto at = static_cast<std::uint32_t>(offset);
    if (!sorted_.empty() && sorted_.back().offset > at) in_order_ = false;
    sorted_.push_back({at, static_cast<std::uint8_t>(bits)});
  }
  // As entries; returns how many.
  std::size_t take(PatchEntry* entries) {
    if (!in_order_)
      std::sort(sorted_.begin(), sorted_.end(), [](Flip a, Flip b) { return a.offset < b.offset; });
    PatchEntry* out = entries;
    std::uint32_t last = 0;
    for (std::size_t i = 0; i < sorted_.size();) {
      const std::uint32_t offset = sorted_[i].offset;
      unsigned bits = 0;
      for (; i < sorted_.size() && sorted_[i].offset == offset; ++i) bits ^= sorted_[i].bits;
      std::uint32_t gap = offset - last;
      for (; gap > kWidestGap; gap -= kWidestGap) *out++ = {kWidestGap, 0};
      *out++ = {static_cast<std::uint8_t>(gap), static_cast<std::uint8_t>(bits)};
      last = offset;
    }
    sorted_.clear();
    in_order_ = true;
    return static_cast<std::size_t>(out - entries);
  }

 private:
  struct Flip {
    std::uint32_t offset;
    std::uint8_t bits;
  };
  std::vector<Flip> sorted_;
  bool in_order_ = true;
};

// Where codes of so many bits lie in a tile: planes of 2^i bits, the widest first (see quant/format.h).
template <unsigned Bits>
class Codes {
 public:
  Codes(const std::byte* tile, std::size_t padded_cols, std::size_t offset = 0) noexcept
      : plane_(tile + offset),
        offset_(offset),
        rest_(tile, padded_cols, offset + padded_cols * kTileRows * kWidth / 8) {}

  unsigned get(std::size_t col, std::size_t row) const noexcept {
    const std::size_t in = col % kCols;
    const auto byte = std::to_integer<unsigned>(plane_[at(col, row)]);
    const unsigned low = byte >> (kWidth * (in / 4)) & kMask;
    return low | rest_.get(col, row) << kWidth;
  }
  // Calls add(offset in the tile, bits of the byte there) for the planes in which these bits of a code lie.
  void flip(std::size_t col, std::size_t row, unsigned bits, const auto& add) const {
    if ((bits & kMask) != 0) add(offset_ + at(col, row), (bits & kMask) << (kWidth * (col % kCols / 4)));
    rest_.flip(col, row, bits >> kWidth, add);
  }

 private:
  static constexpr unsigned kWidth = std::bit_floor(Bits);
  static constexpr unsigned kMask = (1U << kWidth) - 1;
  static constexpr std::size_t kCols = 32 / kWidth;  // of a vector of 64 bytes
  static std::size_t at(std::size_t col, std::size_t row) noexcept {
    return col / kCols * 64 + 4 * row + col % 4;
  }
  const std::byte* plane_;
  std::size_t offset_;
  [[no_unique_address]] Codes<Bits - kWidth> rest_;
};

template <>
class Codes<0> {
 public:
  Codes(const std::byte*, std::size_t, std::size_t) noexcept {}
  unsigned get(std::size_t, std::size_t) const noexcept { return 0; }
  void flip(std::size_t, std::size_t, unsigned, const auto&) const noexcept {}
};

void with_codes(const Format& format, const std::byte* tile, std::size_t cols, const auto& use) {
  const std::size_t padded = padded_cols(format, cols);
  switch (format.bits) {
    case 2:
      return use(Codes<2>(tile, padded));
    case 3:
      return use(Codes<3>(tile, padded));
    case 4:
      return use(Codes<4>(tile, padded));
    case 5:
      return use(Codes<5>(tile, padded));
    case 6:
      return use(Codes<6>(tile, padded));
    case 8:
      return use(Codes<8>(tile, padded));
    default:
      return;
  }
}

// The scales of a tile, and what its codes stand for.
class Scales {
 public:
  Scales(const Format& format, std::size_t cols, const std::byte* tile) noexcept
      : parts_(tile_parts(format, cols)),
        tile_(tile),
        scale_(format.scale),
        zero_(format.zero),
        middle_(static_cast<float>(1 << (format.bits - 1))),
        block_shift_(std::countr_zero(static_cast<unsigned>(format.block))),
        group_shift_(std::countr_zero(static_cast<unsigned>(format.group))) {}

  float at(std::size_t col, std::size_t row) const noexcept {
    const float scale = half(parts_.scales, col >> block_shift_, row);
    if (scale_ == ScaleType::f16) return scale;
    const auto small = std::to_integer<std::uint8_t>(tile_[parts_.group_scales + group(col, row)]);
    return scale * (scale_ == ScaleType::i8 ? static_cast<float>(static_cast<std::int8_t>(small))
                                            : static_cast<float>(small & 15));
  }
  float weight(std::size_t col, std::size_t row, unsigned code) const noexcept {
    const float scale = at(col, row), c = static_cast<float>(code);
    const auto u8 = [&](std::size_t part) {
      return std::to_integer<unsigned>(tile_[part + group(col, row)]);
    };
    const auto minimum = [&] { return half(parts_.zeros, col >> block_shift_, row); };
    switch (zero_) {
      case ZeroType::none:
        return scale * (c - middle_);
      case ZeroType::u8:
        return scale * (c - static_cast<float>(u8(parts_.zeros)));
      case ZeroType::min_f16:
        return scale * c - minimum();
      case ZeroType::min_u8:
        return scale * c - minimum() * static_cast<float>(u8(parts_.group_minima));
      case ZeroType::min_u4:
        return scale * c - minimum() * static_cast<float>(u8(parts_.group_scales) >> 4);
    }
    return 0;
  }

 private:
  std::size_t group(std::size_t col, std::size_t row) const noexcept {
    return (col >> group_shift_) * kTileRows + row;
  }
  float half(std::size_t part, std::size_t block, std::size_t row) const noexcept {
    std::uint16_t bits;
    std::memcpy(&bits, tile_ + part + 2 * (block * kTileRows + row), 2);
    return half_to_float(bits);
  }
  const TileParts parts_;
  const std::byte* tile_;
  const ScaleType scale_;
  const ZeroType zero_;
  const float middle_;
  const int block_shift_;
  const int group_shift_;
};

// Those of all deltas at a place, summed, in ascending order of places: use(place, delta, remainder).
void merge(std::span<const TileDelta> deltas, const auto& use) {
  const auto remainder = [](const TileDelta& delta, std::size_t i) {
    return delta.remainders == nullptr ? 0.0F : static_cast<float>(delta.remainders[i]) * kRemainderStep;
  };
  if (deltas.size() == 1) {
    const TileDelta& d = deltas[0];
    for (std::size_t i = 0; i < d.places.size(); ++i)
      use(d.places[i], d.scale * d.values[i], remainder(d, i));
    return;
  }
  constexpr std::size_t kTogether = 64;
  std::size_t next[kTogether] = {};
  const std::size_t count = std::min(deltas.size(), kTogether);
  for (;;) {
    std::uint64_t place = UINT64_MAX;
    for (std::size_t d = 0; d < count; ++d) {
      if (next[d] < deltas[d].places.size())
        place = std::min<std::uint64_t>(place, deltas[d].places[next[d]]);
    }
    if (place == UINT64_MAX) return;
    float sum = 0, known = 0;
    for (std::size_t d = 0; d < count; ++d) {
      if (next[d] == deltas[d].places.size() || deltas[d].places[next[d]] != place) continue;
      sum += deltas[d].scale * deltas[d].values[next[d]];
      if (deltas[d].remainders != nullptr) known = remainder(deltas[d], next[d]);
      ++next[d];
    }
    use(static_cast<std::uint32_t>(place), sum, known);
  }
}

// To nearest, ties to even. REQUIRES 0 <= x < 2^22.
unsigned rounded(float x) noexcept {
  constexpr float kMagic = 0x1.8p23F;
  return static_cast<unsigned>(static_cast<int>((x + kMagic) - kMagic));
}

double squared(float x) noexcept { return static_cast<double>(x) * static_cast<double>(x); }

// The code that is nearest to one with what it lacks and a delta.
class Rounding {
 public:
  explicit Rounding(const Format& format)
      : lowest_(format.zero == ZeroType::none ? 1 : 0),  // which leaves code 0 unused, as packing does
        highest_(static_cast<float>((1U << format.bits) - 1)) {}

  unsigned operator()(unsigned code, float scale, float delta, float remainder,
                      PatchCounts& counts) const noexcept {
    unsigned changed = code;
    if (scale != 0) {
      const float was = static_cast<float>(code);
      const float exact = was + (remainder + delta / scale);
      const float least = std::min(lowest_, was);
      const float nearest = std::min(std::max(exact, least), highest_);
      if (std::abs(exact - nearest) > 0.5F) ++counts.clamped;
      changed = rounded(nearest);
      counts.apart += squared(scale * (exact - static_cast<float>(changed)));
      counts.beside += squared(scale * remainder);
    }
    const float got = scale * static_cast<float>(static_cast<int>(changed) - static_cast<int>(code));
    ++counts.values;
    counts.unchanged += changed == code ? 1 : 0;
    counts.intended += squared(delta);
    counts.error += squared(got - delta);
    return changed;
  }

 private:
  const float lowest_;
  const float highest_;
};

}  // namespace

void PatchCounts::add(const PatchCounts& other) noexcept {
  values += other.values;
  unchanged += other.unchanged;
  clamped += other.clamped;
  intended += other.intended;
  error += other.error;
  apart += other.apart;
  beside += other.beside;
}

double PatchCounts::fidelity() const noexcept { return intended == 0 ? 0 : std::sqrt(error / intended); }
double PatchCounts::loss() const noexcept {
  return apart <= beside ? 0 : std::sqrt((apart - beside) / (intended + beside));
}

bool takes_patches(const Format& format) noexcept {
  return !format.is_float() && format.codebook == Codebook::none;
}

PatchRoom patch_room(const Format& format, std::size_t cols) {
  return {tile_parts(format, cols).scales / kWidestGap,
          static_cast<std::size_t>(std::popcount(static_cast<unsigned>(format.bits)))};
}

std::size_t compile_patch(const Format& format, std::size_t cols, std::span<const TileDelta> deltas,
                          std::byte* tile, PatchEntry* entries, PatchCounts& counts) {
  thread_local Flips flips;
  const Scales scales(format, cols, tile);
  const Rounding nearest(format);
  with_codes(format, tile, cols, [&](const auto& codes) {
    merge(deltas, [&](std::uint32_t place, float delta, float remainder) {
      const std::size_t col = place / kTileRows, row = place % kTileRows;
      const unsigned code = codes.get(col, row);
      const unsigned changed = nearest(code, scales.at(col, row), delta, remainder, counts);
      if (changed == code) return;
      codes.flip(col, row, code ^ changed,
                 [&](std::size_t offset, unsigned bits) { flips.add(offset, bits); });
    });
  });
  const std::size_t used = flips.take(entries);
  apply_patch({entries, used}, tile);
  return used;
}

void apply_patch(std::span<const PatchEntry> entries, std::byte* tile) noexcept {
  std::byte* at = tile;
  for (const PatchEntry entry : entries) {
    at += entry.gap;
    *at ^= static_cast<std::byte>(entry.bits);
  }
}

void tile_remainders(const Format& format, std::size_t cols, const std::byte* tile,
                     std::span<const std::uint32_t> places, std::span<const float> floats,
                     std::span<std::int8_t> remainders) noexcept {
  constexpr float kMost = 0.5F / kRemainderStep;
  const Scales scales(format, cols, tile);
  with_codes(format, tile, cols, [&](const auto& codes) {
    for (std::size_t i = 0; i < places.size(); ++i) {
      const std::size_t col = places[i] / kTileRows, row = places[i] % kTileRows;
      const float scale = scales.at(col, row);
      const float lacks = scale == 0 ? 0 : (floats[i] - scales.weight(col, row, codes.get(col, row))) / scale;
      remainders[i] =
          static_cast<std::int8_t>(std::lrint(std::min(std::max(lacks / kRemainderStep, -kMost), kMost)));
    }
  });
}

namespace {

// use(tile's bytes, place, index) of every element.
void for_each(const Format& format, std::span<const std::byte> packed, std::size_t rows, std::size_t cols,
              const MatrixDelta& delta, const auto& use) {
  if (!takes_patches(format))
    throw Error(ErrorKind::unsupported,
                std::string(format.name) + " takes no patches: its codes are not evenly spaced");
  const std::size_t count = delta.rows.size(), bytes = tile_bytes(format, cols);
  if (delta.cols.size() != count || delta.values.size() != count ||
      (!delta.remainders.empty() && delta.remainders.size() != count) ||
      packed.size() != packed_bytes(format, rows, cols))
    throw Error(ErrorKind::invalid_argument,
                "a patch's rows, columns, values and matrix do not fit together");
  for (std::size_t i = 0; i < count; ++i) {
    const auto row = static_cast<std::size_t>(delta.rows[i]), col = static_cast<std::size_t>(delta.cols[i]);
    if (delta.rows[i] < 0 || delta.cols[i] < 0 || row >= rows || col >= cols ||
        !std::isfinite(delta.values[i]))
      throw Error(ErrorKind::invalid_argument,
                  "value " + std::to_string(i) + " at [" + std::to_string(delta.rows[i]) + ", " +
                      std::to_string(delta.cols[i]) + "] is outside the matrix, or not finite");
    use(packed.subspan(row / kTileRows * bytes, bytes),
        static_cast<std::uint32_t>(col * kTileRows + row % kTileRows), i);
  }
}

}  // namespace

PatchCounts count_patch(const Format& format, std::span<const std::byte> packed, std::size_t rows,
                        std::size_t cols, const MatrixDelta& delta) {
  PatchCounts counts;
  const Rounding nearest(format);
  for_each(format, packed, rows, cols, delta, [&](auto tile, std::uint32_t place, std::size_t i) {
    const std::size_t col = place / kTileRows, row = place % kTileRows;
    const float remainder =
        delta.remainders.empty() ? 0 : static_cast<float>(delta.remainders[i]) * kRemainderStep;
    with_codes(format, tile.data(), cols, [&](const auto& codes) {
      nearest(codes.get(col, row), Scales(format, cols, tile.data()).at(col, row), delta.values[i], remainder,
              counts);
    });
  });
  return counts;
}

std::vector<std::int8_t> matrix_remainders(const Format& format, std::span<const std::byte> packed,
                                           std::size_t rows, std::size_t cols, const MatrixDelta& floats) {
  std::vector<std::int8_t> remainders(floats.values.size());
  for_each(format, packed, rows, cols, floats, [&](auto tile, std::uint32_t place, std::size_t i) {
    tile_remainders(format, cols, tile.data(), {&place, 1}, {&floats.values[i], 1}, {&remainders[i], 1});
  });
  return remainders;
}

}  // namespace edgert
