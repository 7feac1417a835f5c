// One integer tile: what it is made of, where its parts lie, and its codes and scales as vectors (see
// vector.h).
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <type_traits>

#include "kernels/kernels.h"
#include "kernels/vector.h"

namespace edgert {

// What a product depends on at compile time; formats that agree in it share the code.
struct Kind {
  int bits;
  ScaleType scale;
  ZeroType zero;  // u8 stands for none as well, where no block has integers for scales
  Codebook codebook;
  int halves;  // 2 where 16 columns share a scale

  constexpr bool has_blocks() const {
    return scale == ScaleType::i8 || scale == ScaleType::u4 || scale == ScaleType::u4x2;
  }
  constexpr bool has_minima() const { return zero >= ZeroType::min_f16; }
  // The largest code that meets a dot product; values of codebooks become unsigned by codebook_offset.
  constexpr int largest() const {
    if (codebook == Codebook::none) return (1 << bits) - 1;
    return codebook == Codebook::iq4_nl ? 255 : 2 * codebook_offset();
  }
  constexpr int codebook_offset() const {
    if (codebook == Codebook::iq4_nl) return 128;
    int largest_value = 0;
    for (const int value : codebook_values(codebook)) largest_value = std::max(largest_value, value);
    return largest_value;
  }
  // The zero of every group, where they do not have one each.
  constexpr int zero_code() const {
    return codebook != Codebook::none ? codebook_offset() : has_minima() ? 0 : 1 << (bits - 1);
  }
};

constexpr Kind kind_of(const Format& f) {
  const bool plain = f.scale == ScaleType::f16 && f.zero == ZeroType::none && f.codebook == Codebook::none;
  return {f.bits, f.scale, plain ? ZeroType::u8 : f.zero, f.codebook, f.group == 16 ? 2 : 1};
}

// Where the parts of one integer tile lie.
struct IntegerTile {
  IntegerTile() = default;
  IntegerTile(const Format& f, const TileParts& parts, const std::byte* tile, std::size_t columns)
      : codes(tile),
        scales(tile + parts.scales),
        group_scales(tile + parts.group_scales),
        zeros(f.zero == ZeroType::none ? nullptr : tile + parts.zeros),
        group_minima(tile + parts.group_minima),
        code_bytes(parts.scales),
        padded(columns),
        block_shift(std::countr_zero(static_cast<unsigned>(f.block / kActivationGroup))),
        bytes(parts.bytes),
        next(parts.bytes) {}

  // Of the block in which an activation group lies. Blocks are powers of two.
  std::size_t lane_of_block(std::size_t group) const { return (group >> block_shift) * kTileRows; }

  const std::byte* codes = nullptr;
  const std::byte* scales = nullptr;
  const std::byte* group_scales = nullptr;
  const std::byte* zeros = nullptr;  // or minima; or null
  const std::byte* group_minima = nullptr;
  std::size_t code_bytes = 0;
  std::size_t padded = 0;            // columns
  int block_shift = 0;               // log2 of the activation groups in a block
  std::size_t bytes = 0;             // of the tile
  std::size_t next = 0;              // from this tile to the one that its thread takes next
  const std::byte* ahead = nullptr;  // that one, for a product of a single row; null: none
};

struct QuantizedRow {
  const std::int8_t* codes;
  const float* scales;
  const GroupSum* sums;

  std::int32_t sum(std::size_t group, int half, int halves) const {
    return halves == 1 ? sums[group].all
           : half == 0 ? sums[group].first_half
                       : sums[group].all - sums[group].first_half;
  }
};

inline constexpr int kSteps = kActivationGroup / 4;  // 4-way dot products in an activation group

// Weights come from memory in order: asks for those of a tile well ahead, past its end in the tile that its
// thread takes next, and for that one's scales and zeros.
// A single row asks for the next tile as a whole, from end to end: memory is fastest where a thread reads one
// stream. (int4, AVX-512, two threads, of what a loop that only reads reaches: 0.90 for 2048 columns and 0.83
// for 4096, and with two tiles taken together, each with its codes and scales, 0.79 and 0.75.)
template <int Bits, int M, int T>
struct Prefetch {
  static constexpr std::size_t kGroupBytes = kActivationGroup * kTileRows * Bits / 8, kAhead = 5120 / T;

  Prefetch() = default;
  [[gnu::always_inline]] explicit Prefetch(const IntegerTile& tile)
      : codes(tile.codes),
        code_bytes(tile.code_bytes),
        next(tile.next),
        scales(tile.codes + code_bytes + next),
        scale_bytes((tile.bytes - code_bytes) / (tile.padded / kActivationGroup)),
        whole(tile.ahead) {}

  [[gnu::always_inline]] void operator()(std::size_t group) const {
    if constexpr (M == 1) {
      const std::size_t step = kGroupBytes + scale_bytes;
      if (whole == nullptr) return;
      for (std::size_t i = 0; i < step; i += 64) __builtin_prefetch(whole + group * step + i);
      return;
    }
    std::size_t at = group * kGroupBytes + kAhead;
    if (at >= code_bytes) at += next - code_bytes;
    for (std::size_t i = 0; i < kGroupBytes; i += 64) __builtin_prefetch(codes + at + i);
    __builtin_prefetch(scales + group * scale_bytes);
  }

  const std::byte* codes;
  std::size_t code_bytes;
  std::size_t next;
  const std::byte* scales;
  std::size_t scale_bytes;  // and zeros, of a group
  const std::byte* whole;
};

// A codebook's values, made unsigned by an offset, over and over.
template <Codebook Book, int Offset>
inline constexpr auto kCodebookTable = [] {
  std::array<std::uint8_t, 64> table{};
  for (std::size_t i = 0; i < table.size(); ++i) {
    table[i] = static_cast<std::uint8_t>(codebook_values(Book)[i % 16] + Offset);
  }
  return table;
}();

// One step's codes of one strip of an activation group: four columns.
template <class V, int Bits>
[[gnu::always_inline]] inline typename V::Bits unpack_step(const IntegerTile& tile, std::size_t group,
                                                           int strip, int step) {
  constexpr int kPlane = static_cast<int>(std::bit_floor(static_cast<unsigned>(Bits)));
  constexpr int kStepsAVector = 8 / kPlane;
  constexpr std::uint32_t kMask = 0x01010101u * ((1u << kPlane) - 1);
  const std::byte* p =
      tile.codes + group * (kActivationGroup * kTileRows * kPlane / 8) + strip * V::kWidth * 4;
  const auto v = V::template load_raw<typename V::Bits>(p + step / kStepsAVector * 64);
  const auto low = (v >> (kPlane * (step % kStepsAVector))) & kMask;
  if constexpr (kPlane == Bits) {
    return low;
  } else {
    IntegerTile high_plane = tile;
    high_plane.codes += tile.padded * kTileRows * kPlane / 8;
    return low | (unpack_step<V, Bits - kPlane>(high_plane, group, strip, step) << kPlane);
  }
}

// The same as a dot product wants them: a codebook's values looked up.
template <class V, Kind K>
[[gnu::always_inline]] inline typename V::Bits step_codes(const IntegerTile& tile, std::size_t group,
                                                          int strip, int step) {
  const auto codes = unpack_step<V, K.bits>(tile, group, strip, step);
  if constexpr (K.codebook == Codebook::none) {
    return codes;
  } else {
    const auto& table = kCodebookTable<K.codebook, K.codebook_offset()>;
    return V::lookup(V::template load_raw<typename V::Bits>(table.data()), codes);
  }
}

// The exact dot product of `Steps` steps with codes up to `Largest`. Where narrow sums have 16 bits they are
// widened before they can overflow.
template <class V, int Largest, int Steps>
struct Dot {
  static constexpr int kReach = (1 << 15) / (2 * 127 * Largest);  // steps of two products a lane
  static constexpr int kSpan = std::is_same_v<typename V::Narrow, typename V::Int> || kReach >= Steps
                                   ? Steps
                                   : static_cast<int>(std::bit_floor(static_cast<unsigned>(kReach)));
  typename V::Narrow sum{};
  typename V::Int wide{};
  [[gnu::always_inline]] void add(typename V::Bits codes, typename V::Bits x, int step) {
    sum = V::dot_narrow(sum, codes, x);
    if (kSpan == Steps || (step + 1) % kSpan != 0) return;
    wide += V::widen(sum);
    sum = typename V::Narrow{};
  }
  [[gnu::always_inline]] typename V::Int total() const { return kSpan == Steps ? V::widen(sum) : wide; }
};
template <class V, int Steps>
struct Dot<V, 255, Steps> {
  static constexpr int kSpan = Steps;
  typename V::Int sum{};
  [[gnu::always_inline]] void add(typename V::Bits codes, typename V::Bits x, int) {
    sum = V::dot_int8(sum, codes, x);
  }
  [[gnu::always_inline]] typename V::Int total() const { return sum; }
};

// 2^(code - 128); halves of the smallest normal numbers are exact.
template <class V>
[[gnu::always_inline]] inline typename V::Float load_powers(const std::byte* codes) {
  const auto bits = V::load_u8(codes) << 23;
  const auto smallest = V::splat(std::int32_t{0x00400000});
  return (typename V::Float)(bits < smallest ? smallest : bits) * 0.5f;
}

// What one strip of a tile adds to the sums of the rows, besides its codes, in one activation group.
template <class V, Kind K>
class GroupTerms {
 public:
  // `block` is that of tile.lane_of_block(group).
  [[gnu::always_inline]] GroupTerms(const IntegerTile& tile, std::size_t group, std::size_t block,
                                    int strip) {
    const auto first = static_cast<std::size_t>(strip * V::kWidth);
    const std::size_t lane = block + first;
    if constexpr (K.scale == ScaleType::e8m0) {
      scale_ = load_powers<V>(tile.scales + lane);
    } else {
      scale_ = load_halves(tile.scales, lane);
    }
    if constexpr (K.has_minima()) minimum_ = load_halves(tile.zeros, lane);
    if constexpr (K.has_blocks()) {
      if constexpr (K.scale == ScaleType::u4x2) {
        const auto pair = V::load_u8(tile.group_scales + group * kTileRows + first);
        scales_[0] = pair & 15;
        scales_[1] = pair >> 4;
      }
      for (int half = 0; half < K.halves && K.scale != ScaleType::u4x2; ++half) {
        const std::size_t at = (group * K.halves + static_cast<std::size_t>(half)) * kTileRows + first;
        if constexpr (K.scale == ScaleType::u4) {
          const auto pair = V::load_u8(tile.group_scales + at);
          scales_[half] = pair & 15;
          minima_[half] = pair >> 4;
        } else {
          scales_[half] = V::load_i8(tile.group_scales + at);
          if constexpr (K.has_minima()) minima_[half] = V::load_u8(tile.group_minima + at);
        }
      }
    }
  }

  [[gnu::always_inline]] typename V::Float scale() const { return scale_; }

  // The part of a half's dot product in that of the activation group.
  [[gnu::always_inline]] typename V::Int scaled(typename V::Int dot, int half) const {
    if constexpr (K.has_blocks()) return dot * scales_[half];
    return dot;
  }

  [[gnu::always_inline]] typename V::Float term(typename V::Int dot, const QuantizedRow& x,
                                                std::size_t group) const {
    const auto x_scale = V::splat(x.scales[group]);
    const auto product = (scale_ * x_scale) * V::to_float(dot);
    if constexpr (!K.has_minima()) {
      return product;
    } else if constexpr (!K.has_blocks()) {
      return product - (minimum_ * x_scale) * V::splat(static_cast<float>(x.sums[group].all));
    } else {
      auto minima = V::mul16(minima_[0], V::splat(x.sum(group, 0, K.halves)));
      if constexpr (K.halves == 2) minima += V::mul16(minima_[1], V::splat(x.sum(group, 1, K.halves)));
      return product - (minimum_ * x_scale) * V::to_float(minima);
    }
  }

 private:
  [[gnu::always_inline]] static typename V::Float load_halves(const std::byte* from, std::size_t lane) {
    return V::load(reinterpret_cast<const Half*>(from) + lane);
  }

  typename V::Float scale_, minimum_;
  typename V::Int scales_[K.halves], minima_[K.halves];
};

}  // namespace edgert
