// Matrix products of a step, spread over the threads by tiles of output rows.
#pragma once

#include <initializer_list>
#include <span>

#include "adapters/overlay.h"
#include "kernels/kernels.h"
#include "model/weights.h"
#include "platform/thread_pool.h"

namespace edgert {

struct Machine {
  ThreadPool& pool;
  const KernelTable& kernels;
  Overlay* overlay = nullptr;  // what adapters add; null: nothing

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

  // Rows [first, first + count), quantized as they are. REQUIRES quantized.padded of this matrix, if it is
  // used.
  Activations slice(std::size_t first, std::size_t count) const;
};

// The product of a matrix with `in`, to be run by multiply(). `gather`: see MatMul; null: all rows of `in`.
Product product(const Matrix& matrix, const Activations& in, float* y, std::size_t y_stride,
                const float* bias = nullptr);
void multiply(const Machine& machine, std::span<const Product> products);
inline void multiply(const Machine& machine, std::initializer_list<Product> products) {
  multiply(machine, std::span(products.begin(), products.size()));
}

// Whether a product with one of these formats needs quantize() first.
bool any_integer(std::initializer_list<FormatId> formats);
// Fills in.quantized's arrays from the first `cols` columns.
void quantize(const Machine& machine, Activations& in, std::size_t cols);
// One row of it. REQUIRES quantized.padded of `cols`.
void quantize_row(const Machine& machine, const Activations& in, std::size_t cols, std::size_t row);

}  // namespace edgert
