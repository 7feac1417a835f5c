// Second moments of a matrix's inputs, M = mean of x x^T: they say what an error of its weights costs, which
// is e M e^T for a row of errors e.
//
// Threads: immutable once made; may be shared. Deterministic, as pack.h says.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

namespace edgert {

class Moments {
 public:
  // `values` is [cols, cols] row by row, or [cols], its diagonal. Error{invalid_argument} on another size, by
  // row and column for what is not finite, negative on the diagonal or not symmetric, and for a matrix that
  // is not positive semidefinite.
  Moments(std::span<const float> values, std::size_t cols);

  std::size_t cols() const noexcept { return importance_.size(); }
  bool is_full() const noexcept { return !matrix_.empty(); }

  // e M e^T, but for the damping below, is the sum of importance()[j] * (e[j] + sum over k < j of
  // feedback(j)[k] * e[k])^2: what the error of column j costs once those before it are settled.
  std::span<const float> importance() const noexcept { return importance_; }
  const float* feedback(std::size_t column) const noexcept { return feedback_.data() + column * cols(); }
  const float* row(std::size_t column) const noexcept { return matrix_.data() + column * cols(); }  // of M
  float diagonal(std::size_t column) const noexcept { return diagonal_[column]; }                   // of M

  // Added to the diagonal wherever errors are weighed: inputs that the text never used may be used yet.
  float damping() const noexcept { return damping_; }

 private:
  void factorize();

  std::vector<float> matrix_;  // empty where only the diagonal is known
  std::vector<float> feedback_;
  std::vector<float> importance_;
  std::vector<float> diagonal_;
  float damping_ = 0;
};

}  // namespace edgert
