#include "model/linear.h"

#include <algorithm>

#include "adapters/patch_set.h"

namespace edgert {
namespace {

std::size_t tiles(const MatMul& work) { return (work.rows + kTileRows - 1) / kTileRows; }

// Tiles of one product, their patch first, a pair at a time (as kernels take them), while they are in the
// cache. Patching a tile asks for the next one; the product asks for the one after that.
void run(const KernelTable& kernels, Product work, std::size_t begin, std::size_t end) {
  if (work.repatch == nullptr) return kernels.matmul(work, begin, end);
  const std::size_t bytes = tile_bytes(format(work.format), work.cols);
  const std::byte* const after = work.after;
  for (std::size_t next; begin < end; begin = next) {
    next = std::min(end, begin + 2);
    work.repatch->tiles(begin, next);
    work.after = next + 1 < end ? work.weights + (next + 1) * bytes : after;
    kernels.matmul(work, begin, next);
  }
}

void run(const Machine& machine, std::span<const Product> products) {
  std::size_t total = 0;
  bool alike = true;  // in the work of a tile
  for (const Product& work : products) {
    total += tiles(work);
    alike = alike && work.m == products.front().m;
  }
  // Experts have their own numbers of rows: halves of the tiles would not be halves of the work.
  constexpr std::size_t kPieces = 8;  // of a thread
  const std::size_t piece = total / (kPieces * static_cast<std::size_t>(machine.pool.threads()));
  const std::size_t grain =
      alike ? 0 : std::max<std::size_t>(2, piece / 2 * 2);  // kernels take tiles in pairs
  machine.pool.run(static_cast<int>(total), static_cast<int>(grain), [&](int begin, int end, int) {
    std::size_t from = static_cast<std::size_t>(begin);
    const std::size_t to = static_cast<std::size_t>(end);
    std::size_t first = 0;  // index of this product's first tile among all
    for (std::size_t i = 0; i < products.size() && from < to; ++i) {
      Product work = products[i];
      const std::size_t last = first + tiles(work);
      if (from < last) {
        const std::size_t stop = std::min(to, last);
        if (stop < to) work.after = products[i + 1].weights;
        run(machine.kernels, work, from - first, stop - first);
        from = stop;
      }
      first = last;
    }
  });
  for (const Product& work : products) {
    if (work.repatch != nullptr) work.repatch->finish();
  }
}

}  // namespace

Product product(const Matrix& matrix, const Activations& in, float* y, std::size_t y_stride,
                const float* bias) {
  Product work;
  work.target = matrix.target;
  work.format = matrix.format;
  work.weights = matrix.data;
  work.rows = matrix.rows;
  work.cols = matrix.cols;
  work.x = in.x;
  work.x_stride = in.stride;
  work.quantized = in.quantized;
  work.m = in.rows;
  work.bias = bias;
  work.y = y;
  work.y_stride = y_stride;
  return work;
}

void multiply(const Machine& machine, std::span<const Product> products) {
  if (machine.overlay == nullptr || !machine.overlay->prepare(products)) return run(machine, products);
  run(machine, machine.overlay->all());
  machine.overlay->add(machine.pool, machine.kernels);
}

bool any_integer(std::initializer_list<FormatId> formats) {
  return std::any_of(formats.begin(), formats.end(), [](FormatId id) { return !format(id).is_float(); });
}

Activations Activations::slice(std::size_t first, std::size_t count) const {
  const std::size_t groups = quantized.padded / kActivationGroup;
  return {x + first * stride,
          stride,
          count,
          {quantized.codes + first * quantized.padded, quantized.scales + first * groups,
           quantized.sums + first * groups, quantized.padded}};
}

void quantize(const Machine& machine, Activations& in, std::size_t cols) {
  in.quantized.padded = round_up(cols, kMaxGroup);
  machine.for_rows(in.rows, [&](std::size_t row, int) { quantize_row(machine, in, cols, row); });
}

void quantize_row(const Machine& machine, const Activations& in, std::size_t cols, std::size_t row) {
  const QuantizedRows& q = in.quantized;
  const std::size_t groups = q.padded / kActivationGroup;
  machine.kernels.quantize(in.x + row * in.stride, cols, q.padded, q.codes + row * q.padded,
                           q.scales + row * groups, q.sums + row * groups);
}

}  // namespace edgert
