// Sequence mixing with a state of fixed size, over any vector class (see vector.h): rows one after the other,
// so that a sequence gives the same bits however its rows are cut into calls. Lanes are channels or elements
// of a value; what lies in lanes past the last one is never read as data.
#pragma once

#include "kernels/elementwise.h"
#include "kernels/kernels.h"

namespace edgert {

template <class V>
typename V::Float silu(typename V::Float v) {
  return v / (V::exp(-v) + 1.0f);
}

// One vector of channels from channel `c` on, over all rows.
template <class V, int Width>
void convolve(const Convolution& work, std::size_t c, std::ptrdiff_t lanes) {
  typename V::Float weights[Width], window[Width];
#pragma GCC unroll 8
  for (std::size_t k = 0; k < Width; ++k) {
    weights[k] = V::load(work.weights + (c / kTileRows * Width + k) * kTileRows + c % kTileRows);
    const bool known = work.history && k + 1 < Width;
    window[k] = known ? V::load_partial(work.history + k * work.channels + c, lanes, 0.0f) : V::splat(0.0f);
  }
  const auto bias = work.bias ? V::load_partial(work.bias + c, lanes, 0.0f) : V::splat(0.0f);
  for (std::size_t r = 0; r < static_cast<std::size_t>(work.rows); ++r) {
    window[Width - 1] = V::load_partial(work.x + r * work.x_stride + c, lanes, 0.0f);
    auto sum = bias;
#pragma GCC unroll 8
    for (std::size_t k = 0; k < Width; ++k) sum = V::madd(weights[k], window[k], sum);
    V::store_partial(work.y + r * work.y_stride + c, work.silu ? silu<V>(sum) : sum, lanes);
#pragma GCC unroll 8
    for (std::size_t k = 0; k + 1 < Width; ++k) window[k] = window[k + 1];
  }
  for (std::size_t k = 0; k + 1 < Width; ++k)
    V::store_partial(work.next_history + k * work.channels + c, window[k], lanes);
}

template <class V, int Width = kMaxConvolution>
void convolve_any(const Convolution& work, std::size_t c, std::ptrdiff_t lanes) {
  if constexpr (Width >= 2) {
    if (work.width == Width) return convolve<V, Width>(work, c, lanes);
    convolve_any<V, Width - 1>(work, c, lanes);
  }
}

template <class V>
void convolution(const Convolution& work, std::size_t strip_begin, std::size_t strip_end) {
  const std::size_t end = strip_end * kTileRows < work.channels ? strip_end * kTileRows : work.channels;
  for (std::size_t c = strip_begin * kTileRows; c < end; c += V::kWidth) {
    convolve_any<V>(work, c, static_cast<std::ptrdiff_t>(end - c));
  }
}

// 16 columns of the state, which stay in a cache while the rows go by.
template <class V>
class DeltaStrip {
 public:
  DeltaStrip(const DeltaRule& work, std::size_t column)
      : work_(work),
        dim_(static_cast<std::size_t>(work.key_dim)),
        column_(column),
        state_(work.next_state + column * dim_) {}

  void run() const {
    const float* before = work_.state ? work_.state + column_ * dim_ : nullptr;
    for (std::size_t r = 0; r < static_cast<std::size_t>(work_.rows); ++r) {
      if (before == nullptr) {
        for (std::size_t i = 0; i < dim_ * kTileRows; ++i) state_[i] = 0.0f;
        before = state_;
      }
      step(before, r);
      before = state_;
    }
  }

 private:
  static constexpr std::size_t kSums = 4;  // partial sums, so that one addition need not wait for the last
  using Sums = typename V::Float[kSums][V::kStrips];

  void step(const float* before, std::size_t r) const {
    const float* query = work_.queries + r * work_.row_stride;
    const float* key = work_.keys + r * work_.row_stride;
    const float decay = work_.decay[r * work_.gate_stride];
    Sums remembered = {}, out = {};
    over_keys([&](std::size_t k, std::size_t s, std::size_t sum) {
      const auto kept = V::load(before + at(k, s)) * decay;
      remembered[sum][s] = V::madd(kept, V::splat(key[k]), remembered[sum][s]);
    });
    typename V::Float delta[V::kStrips];
    for (std::size_t s = 0; s < V::kStrips; ++s) {
      const auto value = V::load_partial(work_.values + r * work_.row_stride + lane(s), lanes(s), 0.0f);
      delta[s] = (value - total(remembered, s)) * work_.beta[r * work_.gate_stride];
    }
    over_keys([&](std::size_t k, std::size_t s, std::size_t sum) {
      const auto now = V::madd(V::splat(key[k]), delta[s], V::load(before + at(k, s)) * decay);
      V::store(state_ + at(k, s), now);
      out[sum][s] = V::madd(now, V::splat(query[k]), out[sum][s]);
    });
    for (std::size_t s = 0; s < V::kStrips; ++s)
      V::store_partial(work_.out + r * work_.out_stride + lane(s), total(out, s), lanes(s));
  }

  template <class Body>
  void over_keys(Body&& body) const {
    std::size_t k = 0;
    for (; k + kSums <= dim_; k += kSums) {
#pragma GCC unroll 4
      for (std::size_t sum = 0; sum < kSums; ++sum) {
#pragma GCC unroll 4
        for (std::size_t s = 0; s < V::kStrips; ++s) body(k + sum, s, sum);
      }
    }
    for (; k < dim_; ++k) {
      for (std::size_t s = 0; s < V::kStrips; ++s) body(k, s, std::size_t{0});
    }
  }

  static typename V::Float total(const Sums& sums, std::size_t s) {
    return (sums[0][s] + sums[1][s]) + (sums[2][s] + sums[3][s]);
  }
  static std::size_t at(std::size_t k, std::size_t s) { return k * kTileRows + s * V::kWidth; }
  std::size_t lane(std::size_t s) const { return column_ + s * V::kWidth; }
  std::ptrdiff_t lanes(std::size_t s) const {
    return static_cast<std::ptrdiff_t>(work_.value_dim) - static_cast<std::ptrdiff_t>(lane(s));
  }

  const DeltaRule& work_;
  const std::size_t dim_, column_;
  float* const state_;
};

template <class V>
void delta_rule(const DeltaRule& work) {
  for (std::size_t i = 0; i < static_cast<std::size_t>(work.value_dim); i += kTileRows)
    DeltaStrip<V>(work, i).run();
}

}  // namespace edgert
