// Matrix products of a step, spread over the threads by tiles of output rows.
#pragma once

#include <initializer_list>

#include "kernels/kernels.h"
#include "model/weights.h"
#include "platform/thread_pool.h"

namespace edgert {

struct Machine {
  ThreadPool& pool;
  const KernelTable& kernels;

  // body(row, worker) for each row; in parallel where there are enough to pay for it.
  template <typename Body>
  void for_rows(std::size_t rows, Body&& body) const {
    constexpr std::size_t kInline = 4;
    const auto range = [&](int begin, int end, int worker) {
      for (int row = begin; row < end; ++row) body(static_cast<std::size_t>(row), worker);
    };
    if (rows < kInline) {
      range(0, static_cast<int>(rows), 0);
    } else {
      pool.run(static_cast<int>(rows), 0, range);
    }
  }
};

// Rows of activations and, once quantized, the same rows as integer formats want them.
struct Activations {
  const float* x = nullptr;
  std::size_t stride = 0;
  std::size_t rows = 0;
  QuantizedRows quantized;
};

// The product of a matrix with `in`, to be run by multiply(). `gather`: see MatMul; null: all rows of `in`.
MatMul product(const Matrix& matrix, const Activations& in, float* y, std::size_t y_stride,
               const float* bias = nullptr);
void multiply(const Machine& machine, std::initializer_list<MatMul> products);

// Fills in.quantized's arrays from the first `cols` columns, if one of the formats is an integer one.
void quantize(const Machine& machine, Activations& in, std::size_t cols,
              std::initializer_list<FormatId> formats);

}  // namespace edgert
