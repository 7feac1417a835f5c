#include "model/outer_sums.h"

#include <algorithm>
#include <vector>

namespace edgert {
namespace {

constexpr std::size_t kBlock = 64;     // rows of the sums that a thread takes at a time
constexpr std::size_t kColumns = 256;  // of them; together they stay in a second-level cache

std::size_t blocks(std::size_t n) { return (n + kBlock - 1) / kBlock; }

std::size_t products_floats(int threads) { return static_cast<std::size_t>(threads) * kBlock * kColumns; }

// Columns [first, end) of the rows, one after the other.
void transpose(const ObservedRows& rows, std::size_t from, std::size_t count, std::size_t first,
               std::size_t end, float* to) {
  for (std::size_t t = 0; t < count; ++t) {
    const float* x = rows.row(from + t);
    for (std::size_t i = first; i < end; ++i) to[i * count + t] = x[i];
  }
}

// Tiles of columns [first, end) as an f32 matrix whose columns are the rows; the last tile ends with zeros.
void pack(const ObservedRows& rows, std::size_t from, std::size_t count, std::size_t first, std::size_t end,
          float* to) {
  for (std::size_t j = first; j < end; j += kTileRows) {
    const std::size_t lanes = std::min<std::size_t>(kTileRows, end - j);
    for (std::size_t t = 0; t < count; ++t) {
      float* lane = to + j * count + t * kTileRows;
      std::copy_n(rows.row(from + t) + j, lanes, lane);
      std::fill(lane + lanes, lane + kTileRows, 0.0F);
    }
  }
}

}  // namespace

std::size_t OuterSums::scratch_bytes(std::size_t longest, int threads) {
  return (kRows * (longest + round_up(longest, kTileRows)) + products_floats(threads)) * sizeof(float);
}

OuterSums::OuterSums(Machine machine, std::shared_ptr<Budget> budget, std::size_t longest)
    : machine_(machine),
      memory_(std::move(budget), scratch_bytes(longest, machine.pool.threads()), "calibration"),
      across_(memory_.as<float>()),
      packed_(across_ + kRows * longest),
      products_(packed_ + kRows * round_up(longest, kTileRows)) {}

void OuterSums::add(std::span<const Work> work, std::size_t n, std::size_t k, bool triangle) {
  // A work's rows are cut at the same places whatever stands beside it.
  std::vector<Slice> slices;
  std::size_t rows = 0;
  for (const Work& one : work) {
    for (std::size_t first = 0; first < one.x.count; first += kRows) {
      const std::size_t count = std::min(kRows, one.x.count - first);
      if (rows + count > kRows) {
        add_slices(slices, n, k, triangle);
        slices.clear();
        rows = 0;
      }
      slices.push_back({&one, first, count, across_ + rows * n, packed_ + rows * round_up(k, kTileRows)});
      rows += count;
    }
  }
  add_slices(slices, n, k, triangle);
}

void OuterSums::add_slices(std::span<const Slice> slices, std::size_t n, std::size_t k, bool triangle) {
  const std::size_t pieces = blocks(std::max(n, k));
  machine_.pool.run(static_cast<int>(slices.size() * pieces), 0, [&](int begin, int end, int) {
    for (auto item = static_cast<std::size_t>(begin); item < static_cast<std::size_t>(end); ++item) {
      const Slice& s = slices[item / pieces];
      const std::size_t first = item % pieces * kBlock;
      transpose(s.work->x, s.first, s.count, first, std::min(n, first + kBlock), s.across);
      pack(s.work->y, s.first, s.count, first, std::min(k, first + kBlock), s.packed);
    }
  });
  const std::size_t bands = blocks(n);
  machine_.pool.run(static_cast<int>(slices.size() * bands), 1, [&](int begin, int end, int worker) {
    float* products = products_ + static_cast<std::size_t>(worker) * kBlock * kColumns;
    for (auto item = static_cast<std::size_t>(begin); item < static_cast<std::size_t>(end); ++item) {
      const std::size_t band = bands - 1 - item % bands;  // of a triangle the longest first
      add_block(slices[item / bands], band * kBlock, n, k, triangle, products);
    }
  });
}

void OuterSums::add_block(const Slice& slice, std::size_t first, std::size_t n, std::size_t k, bool triangle,
                          float* products) {
  const std::size_t last = std::min(n, first + kBlock);
  const std::size_t columns = triangle ? last : k;
  for (std::size_t from = 0; from < columns; from += kColumns) {
    const std::size_t width = std::min(kColumns, columns - from);
    MatMul product;
    product.weights = reinterpret_cast<const std::byte*>(slice.packed + from * slice.count);
    product.rows = width;
    product.cols = slice.count;
    product.x = slice.across + first * slice.count;
    product.x_stride = slice.count;
    product.m = last - first;
    product.y = products;
    product.y_stride = kColumns;
    machine_.kernels.matmul(product, 0, (width + kTileRows - 1) / kTileRows);
    for (std::size_t i = first; i < last; ++i) {
      const float* from_row = products + (i - first) * kColumns;
      double* to = slice.work->sums + (triangle ? triangle_size(i) : i * k) + from;
      const std::size_t count = triangle ? std::min(width, i + 1 > from ? i + 1 - from : 0) : width;
      for (std::size_t j = 0; j < count; ++j) to[j] += static_cast<double>(from_row[j]);
    }
  }
}

void OuterSums::add_squares(std::span<const Work> work, std::size_t n) {
  const std::size_t pieces = blocks(n);
  machine_.pool.run(static_cast<int>(work.size() * pieces), 0, [&](int begin, int end, int) {
    for (auto item = static_cast<std::size_t>(begin); item < static_cast<std::size_t>(end); ++item) {
      const Work& one = work[item / pieces];
      const std::size_t first = item % pieces * kBlock;
      const std::size_t last = std::min(n, first + kBlock);
      for (std::size_t t = 0; t < one.x.count; ++t) {
        const float* x = one.x.row(t);
        for (std::size_t i = first; i < last; ++i) {
          const auto value = static_cast<double>(x[i]);
          one.sums[i] += value * value;
        }
      }
    }
  });
}

void OuterSums::add_rows(const Work& work, std::size_t n) {
  machine_.pool.run(static_cast<int>(n), 0, [&](int begin, int end, int) {
    for (std::size_t t = 0; t < work.x.count; ++t) {
      const float* x = work.x.row(t);
      for (int i = begin; i < end; ++i) work.sums[i] += static_cast<double>(x[i]);
    }
  });
}

}  // namespace edgert
