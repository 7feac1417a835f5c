// All kernels of one vector class as a table.
#pragma once

#include "kernels/attention.h"
#include "kernels/dot_rate.h"
#include "kernels/elementwise.h"
#include "kernels/matmul.h"
#include "kernels/recurrence.h"

namespace edgert {

template <class V>
constexpr KernelTable table_of(std::string_view name) {
  return {.name = name,
          .matmul = matmul<V>,
          .quantize = quantize<V>,
          .rms_norm = rms_norm<V>,
          .layer_norm = layer_norm<V>,
          .silu_mul = silu_mul<V>,
          .gelu_tanh_mul = gelu_tanh_mul<V>,
          .clamped_swiglu = clamped_swiglu<V>,
          .sigmoid_mul = sigmoid_mul<V>,
          .softmax = softmax<V>,
          .attention = attention<V>,
          .store_kv = store_kv<V>,
          .convolution = convolution<V>,
          .delta_rule = delta_rule<V>,
          .dot_rounds = dot_rounds<V>};
}

}  // namespace edgert
