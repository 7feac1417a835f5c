#include "quant/moments.h"

#include <algorithm>
#include <cmath>
#include <sstream>
#include <string>

#include "platform/error.h"

namespace edgert {

namespace {

constexpr double kDamping = 0.01;  // of the mean of the diagonal
constexpr double kAsymmetry =
    1e-3;  // of the root of the two diagonals' product: what sums in another order differ by

using Pair = double __attribute__((vector_size(16)));

Pair load_pair(const double* from) noexcept {
  Pair pair;
  __builtin_memcpy(&pair, from, sizeof pair);
  return pair;
}

[[noreturn]] void refuse(const std::string& where, double value, const char* needed) {
  std::ostringstream message;
  message << "moments: " << where << " is " << value << ": " << needed;
  throw Error(ErrorKind::invalid_argument, message.str());
}

std::string at(std::size_t row, std::size_t col) {
  return "row " + std::to_string(row) + ", column " + std::to_string(col);
}

// Rows of a symmetric matrix from its last to its first become rows of the lower factor L, M = L L^T in that
// order.
class Factor {
 public:
  Factor(std::size_t size, std::size_t stride) : size_(size), stride_(stride), rows_(size * stride) {}
  double* row(std::size_t i) noexcept { return rows_.data() + i * stride_; }

  // The index of a pivot that is not positive, or the size.
  std::size_t run() noexcept {
    for (std::size_t first = 0; first < size_; first += kBlock) {
      const std::size_t end = std::min(first + kBlock, size_);
      for (std::size_t j = 0; j < end; j += kColumns) {
        const std::size_t count = std::min(kColumns, size_ - j);
        // All that the columns before a block of columns take from it; then the block itself.
        for (std::size_t i = std::max(first, j); i < end; ++i) {
          double dots[kColumns];
          dot(row(i), j, count, dots);
          for (std::size_t c = 0; c < count && j + c <= i; ++c) {
            double sum = row(i)[j + c] - dots[c];
            for (std::size_t k = j; k < j + c; ++k) sum -= row(i)[k] * row(j + c)[k];
            if (j + c == i) {
              if (!(sum > 0) || !std::isfinite(sum)) return i;
              row(i)[i] = std::sqrt(sum);
            } else {
              row(i)[j + c] = sum / row(j + c)[j + c];
            }
          }
        }
      }
    }
    return size_;
  }

 private:
  static constexpr std::size_t kBlock = 32;   // rows that use the rows before them while these are in a cache
  static constexpr std::size_t kColumns = 4;  // rows that are multiplied with one at a time

  // Products of the first `length` columns of a row with those of `count` rows from `first` on.
  void dot(const double* x, std::size_t first, std::size_t count, double (&dots)[kColumns]) noexcept {
    Pair sums[kColumns][2] = {};
    const double* y[kColumns];
    for (std::size_t c = 0; c < kColumns; ++c) y[c] = row(first + std::min(c, count - 1));
    for (std::size_t k = 0; k + 4 <= first; k += 4) {
      const Pair a = load_pair(x + k), b = load_pair(x + k + 2);
#pragma GCC unroll 4
      for (std::size_t c = 0; c < kColumns; ++c) {
        sums[c][0] += a * load_pair(y[c] + k);
        sums[c][1] += b * load_pair(y[c] + k + 2);
      }
    }
    for (std::size_t c = 0; c < kColumns; ++c) {
      const Pair sum = sums[c][0] + sums[c][1];
      dots[c] = sum[0] + sum[1];
    }
  }

  std::size_t size_;
  std::size_t stride_;
  std::vector<double> rows_;
};

}  // namespace

Moments::Moments(std::span<const float> values, std::size_t cols) : importance_(cols), diagonal_(cols) {
  const bool full = cols > 1 && values.size() / cols == cols && values.size() % cols == 0;
  if (cols == 0 || (values.size() != cols && !full)) {
    throw Error(ErrorKind::invalid_argument, "moments: " + std::to_string(values.size()) +
                                                 " values; needed are " + std::to_string(cols) +
                                                 ", or as many squared");
  }
  const std::size_t next = full ? cols + 1 : 1;  // from one value of the diagonal to the next
  double sum = 0;
  for (std::size_t i = 0; i < cols; ++i) {
    const float value = diagonal_[i] = values[i * next];
    if (!std::isfinite(value) || value < 0)
      refuse(at(i, i), static_cast<double>(value), "a mean of squares is finite and not negative");
    sum += static_cast<double>(value);
  }
  // Where nothing is known all columns are alike.
  damping_ = sum > 0 ? static_cast<float>(kDamping * sum / static_cast<double>(cols)) : 1.0F;
  for (std::size_t i = 0; i < cols; ++i) importance_[i] = diagonal_[i] + damping_;
  if (!full) return;
  matrix_.assign(values.begin(), values.end());
  for (std::size_t i = 0; i < cols; ++i) {
    for (std::size_t k = 0; k < i; ++k) {
      const double here = static_cast<double>(row(i)[k]), there = static_cast<double>(row(k)[i]);
      if (!std::isfinite(here) || !std::isfinite(there)) refuse(at(i, k), here, "moments are finite");
      const double allowed =
          kAsymmetry * std::sqrt(static_cast<double>(diagonal_[i]) * static_cast<double>(diagonal_[k]));
      if (std::fabs(here - there) > allowed + static_cast<double>(damping_) * kAsymmetry)
        refuse(at(i, k), here, "the matrix is symmetric");
    }
  }
  factorize();
}

void Moments::factorize() {
  const std::size_t n = cols(), stride = (n + 3) / 4 * 4;
  Factor factor(n, stride);
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t k = 0; k <= i; ++k) factor.row(i)[k] = static_cast<double>(row(n - 1 - i)[n - 1 - k]);
    factor.row(i)[i] += static_cast<double>(damping_);
  }
  if (const std::size_t bad = factor.run(); bad != n) {
    throw Error(ErrorKind::invalid_argument, "moments: not positive semidefinite (column " +
                                                 std::to_string(n - 1 - bad) + "); means of x x^T are");
  }
  feedback_.resize(n * n);
  for (std::size_t j = 0; j < n; ++j) {
    const std::size_t column = n - 1 - j;
    const double pivot = factor.row(column)[column];
    importance_[j] = static_cast<float>(pivot * pivot);
    for (std::size_t k = 0; k < j; ++k)
      feedback_[j * n + k] = static_cast<float>(factor.row(n - 1 - k)[column] / pivot);
  }
}

}  // namespace edgert
