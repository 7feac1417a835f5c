// The 16 rows of a tile as they compute: a column of them is four vectors.
#pragma once

#include <cstddef>

#include "quant/format.h"
#include "quant/lanes.h"

namespace edgert {

inline constexpr int kRowLanes = kTileRows / kLanes;

struct Rows {
  Lanes lanes[kRowLanes];

  float& at(std::size_t row) noexcept { return reinterpret_cast<float*>(lanes)[row]; }
  float at(std::size_t row) const noexcept { return lanes[row / kLanes][row % kLanes]; }
};

inline Rows all_rows(float x) noexcept { return {{lanes(x), lanes(x), lanes(x), lanes(x)}}; }

// sum += factors[0] * columns[0] + factors[1] * columns[1] ..., in this order.
inline void add_products(Rows& sum, const float* factors, const Rows* columns, std::size_t count) noexcept {
  Lanes a = sum.lanes[0], b = sum.lanes[1], c = sum.lanes[2], d = sum.lanes[3];
  for (std::size_t k = 0; k < count; ++k) {
    const Lanes factor = lanes(factors[k]);
    a += factor * columns[k].lanes[0];
    b += factor * columns[k].lanes[1];
    c += factor * columns[k].lanes[2];
    d += factor * columns[k].lanes[3];
  }
  sum = {{a, b, c, d}};
}

}  // namespace edgert
