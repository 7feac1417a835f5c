// Sums of outer products over the rows of a step, in f64.
//
// Products of at most kRows rows are summed in f32 by the kernels' matrix product, and added to the sums in
// f64. Threads: add() and the like by one thread at a time; work is spread over the pool. The sums do not
// depend on the number of threads, nor on what else is added by the same call. Ownership: the sums are the
// caller's.
#pragma once

#include <cstddef>
#include <span>

#include "model/linear.h"
#include "model/observer.h"
#include "platform/memory.h"

namespace edgert {

constexpr std::size_t triangle_size(std::size_t n) { return n * (n + 1) / 2; }

class OuterSums {
 public:
  static constexpr std::size_t kRows = 256;

  // `longest`: of the vectors that will be added.
  static std::size_t scratch_bytes(std::size_t longest, int threads);
  OuterSums(Machine machine, std::shared_ptr<Budget> budget, std::size_t longest);

  struct Work {
    ObservedRows x;
    ObservedRows y;  // as many
    double* sums = nullptr;
  };
  // sums[i][j] += sum over rows of x[i] * y[j]; i below `n`, j below `k`.
  void add(std::span<const Work> work, std::size_t n, std::size_t k) { add(work, n, k, false); }
  // The lower triangle, row after row, of the same with y = x.
  void add_triangles(std::span<const Work> work, std::size_t n) { add(work, n, n, true); }
  // sums[i] += sum over rows of x[i]^2; y is not looked at.
  void add_squares(std::span<const Work> work, std::size_t n);
  // sums[i] += sum over rows of x[i]; likewise.
  void add_rows(const Work& work, std::size_t n);

 private:
  struct Slice {  // of a work's rows, as packed
    const Work* work;
    std::size_t first;
    std::size_t count;
    float* across;  // [n][count], x transposed
    float* packed;  // y as an f32 matrix [k, count]
  };
  void add(std::span<const Work> work, std::size_t n, std::size_t k, bool triangle);
  void add_slices(std::span<const Slice> slices, std::size_t n, std::size_t k, bool triangle);
  void add_block(const Slice& slice, std::size_t first, std::size_t n, std::size_t k, bool triangle,
                 float* products);

  Machine machine_;
  Buffer memory_;
  float* across_;    // [kRows][longest]
  float* packed_;    // [kRows][longest, padded]
  float* products_;  // [threads][kBlock][kColumns]
};

}  // namespace edgert
