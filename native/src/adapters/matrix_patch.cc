// What patches make of a matrix, and the remainders that they need: for conversion, one element at a time.
#include <algorithm>
#include <cmath>
#include <string>

#include "adapters/patch_rounding.h"
#include "platform/error.h"
#include "quant/pack.h"

namespace edgert {

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
  Rounding nearest(format);
  Batch one;
  one.count = 1;
  for_each(format, packed, rows, cols, delta, [&](auto tile, std::uint32_t place, std::size_t i) {
    one.places[0] = place;
    one.deltas[0] = delta.values[i];
    one.remainders[0] =
        delta.remainders.empty() ? 0 : static_cast<float>(delta.remainders[i]) * kRemainderStep;
    with_codes(format, tile.data(), cols,
               [&](const auto& codes) { one.gather(codes, Scales(format, cols, tile.data())); });
    nearest(one);
  });
  return nearest.counts();
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
