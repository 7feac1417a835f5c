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
  return {name,       matmul<V>,    quantize<V>, rms_norm<V>,    silu_mul<V>,   sigmoid_mul<V>,
          softmax<V>, attention<V>, store_kv<V>, convolution<V>, delta_rule<V>, dot_rounds<V>};
}

}  // namespace edgert
