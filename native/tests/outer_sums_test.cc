#include "model/outer_sums.h"

#include <doctest/doctest.h>

#include <cmath>
#include <random>
#include <vector>

namespace edgert {
namespace {

std::vector<float> random_rows(std::size_t count, std::size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> rows(count * n);
  for (float& value : rows) value = normal(random);
  return rows;
}

struct Sums {
  explicit Sums(int threads = 1, std::size_t longest = 400)
      : pool(threads), outer({pool, kernels()}, std::make_shared<Budget>(1 << 30), longest) {}
  ThreadPool pool;
  OuterSums outer;
};

// The triangle of 300 gathered rows, with another work in front that shifts where they are packed.
std::vector<double> triangle(int threads, std::size_t n, std::size_t rows_before) {
  Sums sums(threads);
  const auto x = random_rows(400, n + 3, 1);
  std::vector<std::int32_t> gather(300);
  for (std::size_t i = 0; i < gather.size(); ++i) gather[i] = static_cast<std::int32_t>((i * 7) % 400);
  std::vector<double> first(triangle_size(n)), second(triangle_size(n));
  const ObservedRows before{x.data(), n + 3, rows_before}, rows{x.data(), n + 3, 300, gather.data()};
  const std::vector<OuterSums::Work> work{{before, before, first.data()}, {rows, rows, second.data()}};
  sums.outer.add_triangles(work, n);
  return second;
}

}  // namespace

TEST_CASE("sums of outer products are those of a plain loop") {
  for (const std::size_t n : {1, 15, 64, 65, 257, 400}) {
    const auto found = triangle(2, n, 17);
    const auto x = random_rows(400, n + 3, 1);
    std::vector<double> expected(triangle_size(n));
    for (std::size_t r = 0; r < 300; ++r) {
      const float* row = x.data() + (r * 7) % 400 * (n + 3);
      for (std::size_t i = 0; i < n; ++i) {
        for (std::size_t j = 0; j <= i; ++j)
          expected[triangle_size(i) + j] += static_cast<double>(row[i]) * static_cast<double>(row[j]);
      }
    }
    double worst = 0;
    for (std::size_t i = 0; i < expected.size(); ++i)
      worst = std::max(worst, std::fabs(found[i] - expected[i]));
    CAPTURE(n);
    CHECK(worst < 300 * 2e-6);
  }
}

TEST_CASE("sums depend neither on threads nor on what is added beside them") {
  const auto expected = triangle(1, 257, 0);
  CHECK(triangle(3, 257, 0) == expected);
  CHECK(triangle(1, 257, 199) == expected);
  CHECK(triangle(2, 257, 400) == expected);
}

TEST_CASE("products of two kinds of rows, squares and sums") {
  Sums sums;
  const std::size_t n = 70, k = 5, count = 3;
  const auto x = random_rows(count, n, 2), y = random_rows(count, k, 3);
  const ObservedRows xs{x.data(), n, count}, ys{y.data(), k, count};
  std::vector<double> products(n * k), squares(n), added(n);
  const OuterSums::Work work{xs, ys, products.data()}, square{xs, {}, squares.data()};
  for (int twice = 0; twice < 2; ++twice) {
    sums.outer.add(std::span(&work, 1), n, k);
    sums.outer.add_squares(std::span(&square, 1), n);
    sums.outer.add_rows({xs, {}, added.data()}, n);
  }
  for (std::size_t i = 0; i < n; ++i) {
    double square_sum = 0, sum = 0;
    for (std::size_t r = 0; r < count; ++r) {
      const auto value = static_cast<double>(x[r * n + i]);
      square_sum += value * value;
      sum += value;
    }
    CHECK(squares[i] == doctest::Approx(2 * square_sum));
    CHECK(added[i] == doctest::Approx(2 * sum));
    for (std::size_t j = 0; j < k; ++j) {
      double product = 0;
      for (std::size_t r = 0; r < count; ++r)
        product += static_cast<double>(x[r * n + i]) * static_cast<double>(y[r * k + j]);
      CHECK(products[i * k + j] == doctest::Approx(2 * product).epsilon(1e-4));
    }
  }
}

TEST_CASE("nothing is added without rows") {
  Sums sums;
  double sum = 5;
  const OuterSums::Work none{{nullptr, 1, 0}, {nullptr, 1, 0}, &sum};
  sums.outer.add_triangles(std::span(&none, 1), 1);
  sums.outer.add_triangles({}, 1);
  sums.outer.add_squares(std::span(&none, 1), 1);
  CHECK(sum == 5);
}

}  // namespace edgert
