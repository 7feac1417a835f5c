// Functions of one vector, over any vector class (see vector.h). Sums run over 16 lanes, then as a tree.
#pragma once

#include "kernels/kernels.h"
#include "kernels/vector.h"

namespace edgert {

// A group with NaN or Inf gets codes 0 and that value as scale, so that its products are NaN.
template <class V>
void quantize(const float* x, std::size_t cols, std::size_t padded, std::int8_t* codes, float* scales,
              GroupSum* sums) {
  constexpr int kVectors = kActivationGroup / V::kWidth;
  for (std::size_t begin = 0; begin < padded; begin += kActivationGroup) {
    const float* from = x + begin;
    float tail[kActivationGroup];
    if (begin + kActivationGroup > cols) {
      for (std::size_t i = 0; i < kActivationGroup; ++i) tail[i] = begin + i < cols ? x[begin + i] : 0.0f;
      from = tail;
    }
    using Int = typename V::Int;
    typename V::Float v[kVectors];
    Int largest{};  // as bits, which order |x| with NaN above all
    for (int i = 0; i < kVectors; ++i) {
      v[i] = V::load(from + i * V::kWidth);
      const auto bits = (Int)V::abs(v[i]);
      largest = bits > largest ? bits : largest;
    }
    const std::int32_t max_bits = V::fold(largest, [](Int a, Int b) { return a > b ? a : b; });
    const float scale = __builtin_bit_cast(float, max_bits) / 127.0f;
    const bool usable = scale > 0.0f && scale < __builtin_inff();

    Int halves[2] = {};
    for (int i = 0; i < kVectors; ++i) {
      Int code{};
      if (usable) code = V::round(V::min(V::max(v[i] / scale, V::splat(-127.0f)), V::splat(127.0f)));
      halves[i / (kVectors / 2)] += code;
      const auto bytes = __builtin_convertvector(code, typename VectorOf<std::int8_t, V::kWidth>::type);
      __builtin_memcpy(codes + begin + i * V::kWidth, &bytes, sizeof bytes);
    }
    const auto add = [](Int a, Int b) { return a + b; };
    const std::int32_t first = V::fold(halves[0], add), second = V::fold(halves[1], add);
    scales[begin / kActivationGroup] = scale;
    sums[begin / kActivationGroup] = {first + second, first};
  }
}

template <class V>
void rms_norm(const float* x, const float* weight, std::size_t n, float eps, float* y) {
  typename V::Float squares[V::kStrips] = {};
  for_each_strip<V>(n, [&](std::size_t i, int strip, std::ptrdiff_t lanes) {
    const auto v = V::load_partial(x + i, lanes, 0.0f);
    squares[strip] = V::madd(v, v, squares[strip]);
  });
  const float scale = 1.0f / __builtin_sqrtf(V::sum(squares) / static_cast<float>(n) + eps);
  for_each_strip<V>(n, [&](std::size_t i, int, std::ptrdiff_t lanes) {
    const auto v = V::load_partial(x + i, lanes, 0.0f) * scale;
    const auto w = weight != nullptr ? V::load_partial(weight + i, lanes, 0.0f) : V::splat(1.0f);
    V::store_partial(y + i, v * w, lanes);
  });
}

template <class V>
void layer_norm(const float* x, const float* weight, const float* bias, std::size_t n, float eps, float* y) {
  typename V::Float sums[V::kStrips] = {}, squares[V::kStrips] = {};
  for_each_strip<V>(n, [&](std::size_t i, int strip, std::ptrdiff_t lanes) {
    sums[strip] += V::load_partial(x + i, lanes, 0.0f);
  });
  const float mean = V::sum(sums) / static_cast<float>(n);
  for_each_strip<V>(n, [&](std::size_t i, int strip, std::ptrdiff_t lanes) {
    const auto v = V::load_partial(x + i, lanes, mean) - mean;
    squares[strip] = V::madd(v, v, squares[strip]);
  });
  const float scale = 1.0f / __builtin_sqrtf(V::sum(squares) / static_cast<float>(n) + eps);
  for_each_strip<V>(n, [&](std::size_t i, int, std::ptrdiff_t lanes) {
    const auto v = (V::load_partial(x + i, lanes, mean) - mean) * scale;
    const auto w = V::load_partial(weight + i, lanes, 0.0f);
    V::store_partial(y + i, V::madd(v, w, V::load_partial(bias + i, lanes, 0.0f)), lanes);
  });
}

template <class V>
void silu_mul(float* gate, const float* up, std::size_t n) {
  for_each_strip<V>(n, [&](std::size_t i, int, std::ptrdiff_t lanes) {
    const auto g = V::load_partial(gate + i, lanes, 0.0f);
    const auto silu = g / (V::exp(-g) + 1.0f);
    V::store_partial(gate + i, silu * V::load_partial(up + i, lanes, 0.0f), lanes);
  });
}

template <class V>
void sigmoid_mul(float* x, const float* gate, std::size_t n) {
  for_each_strip<V>(n, [&](std::size_t i, int, std::ptrdiff_t lanes) {
    const auto g = V::load_partial(gate + i, lanes, 0.0f);
    V::store_partial(x + i, V::load_partial(x + i, lanes, 0.0f) / (V::exp(-g) + 1.0f), lanes);
  });
}

// 0.5 (1 + tanh(z)) is the sigmoid of 2z.
template <class V>
void gelu_tanh_mul(float* gate, const float* up, std::size_t n) {
  for_each_strip<V>(n, [&](std::size_t i, int, std::ptrdiff_t lanes) {
    const auto g = V::load_partial(gate + i, lanes, 0.0f);
    const auto twice = g * (V::madd(g * g, V::splat(0.044715f), V::splat(1.0f)) * -1.5957691216f);
    V::store_partial(gate + i, g / (V::exp(twice) + 1.0f) * V::load_partial(up + i, lanes, 0.0f), lanes);
  });
}

template <class V>
void clamped_swiglu(float* gate, const float* up, std::size_t n, float alpha, float limit) {
  const auto highest = V::splat(limit);
  for_each_strip<V>(n, [&](std::size_t i, int, std::ptrdiff_t lanes) {
    const auto g = V::min(highest, V::load_partial(gate + i, lanes, 0.0f));
    const auto u = V::max(-highest, V::min(highest, V::load_partial(up + i, lanes, 0.0f)));
    V::store_partial(gate + i, g / (V::exp(g * -alpha) + 1.0f) * (u + 1.0f), lanes);
  });
}

// Over x and `sink`, a logit more that may be null; its share is dropped.
template <class V>
void softmax_with(float* x, std::size_t n, const float* sink) {
  const float lowest = -__builtin_inff();
  typename V::Float largest[V::kStrips], sums[V::kStrips] = {};
  for (auto& v : largest) v = V::splat(lowest);
  for_each_strip<V>(n, [&](std::size_t i, int strip, std::ptrdiff_t lanes) {
    largest[strip] = V::max(V::load_partial(x + i, lanes, lowest), largest[strip]);
  });
  float max = V::max(largest);
  if (sink != nullptr && *sink > max) max = *sink;
  for_each_strip<V>(n, [&](std::size_t i, int strip, std::ptrdiff_t lanes) {
    const auto v = V::exp(V::load_partial(x + i, lanes, lowest) - max);
    V::store_partial(x + i, v, lanes);
    sums[strip] += v;
  });
  float sum = V::sum(sums);
  if (sink != nullptr) sum += V::exp(V::splat(*sink - max))[0];
  const float scale = 1.0f / sum;
  for_each_strip<V>(n, [&](std::size_t i, int, std::ptrdiff_t lanes) {
    V::store_partial(x + i, V::load_partial(x + i, lanes, 0.0f) * scale, lanes);
  });
}

template <class V>
void softmax(float* x, std::size_t n) {
  softmax_with<V>(x, n, nullptr);
}

}  // namespace edgert
