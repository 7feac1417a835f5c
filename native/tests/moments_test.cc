#include "quant/moments.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "kernels_support.h"
#include "platform/error.h"
#include "quant/pack.h"
#include "support.h"

using namespace edgert;

namespace {

// The mean of x x^T over `count` vectors whose neighbours go together.
std::vector<float> some_moments(std::size_t cols, std::size_t count, Random& random) {
  std::vector<double> sums(cols * cols);
  std::vector<double> x(cols);
  for (std::size_t n = 0; n < count; ++n) {
    double last = 0;
    for (double& value : x) value = last = 0.8 * last + static_cast<double>(random.uniform(-1, 1));
    for (std::size_t i = 0; i < cols; ++i) {
      for (std::size_t k = 0; k < cols; ++k) sums[i * cols + k] += x[i] * x[k] / static_cast<double>(count);
    }
  }
  return {sums.begin(), sums.end()};
}

double form(const std::vector<float>& moments, const std::vector<double>& e, double damping) {
  const std::size_t cols = e.size();
  double sum = 0;
  for (std::size_t i = 0; i < cols; ++i) {
    sum += damping * e[i] * e[i];
    for (std::size_t k = 0; k < cols; ++k) sum += e[i] * static_cast<double>(moments[i * cols + k]) * e[k];
  }
  return sum;
}

std::string refusal(std::vector<float> values, std::size_t cols) {
  return test::error_of(ErrorKind::invalid_argument, [&] { Moments(values, cols); });
}

}  // namespace

TEST_CASE("importance and feedback say of any errors what the moments say") {
  Random random(1);
  for (const std::size_t cols : {2, 3, 5, 31, 32, 33, 70, 129}) {
    CAPTURE(cols);
    const std::vector<float> values = some_moments(cols, cols / 2 + 1, random);  // not of full rank
    const Moments moments(values, cols);
    REQUIRE(moments.is_full());
    std::vector<double> e(cols);
    for (double& error : e) error = static_cast<double>(random.uniform(-1, 1));
    double sum = 0;
    for (std::size_t j = 0; j < cols; ++j) {
      double effect = e[j];
      for (std::size_t k = 0; k < j; ++k) effect += static_cast<double>(moments.feedback(j)[k]) * e[k];
      sum += static_cast<double>(moments.importance()[j]) * effect * effect;
    }
    CHECK(sum == doctest::Approx(form(values, e, static_cast<double>(moments.damping()))).epsilon(1e-4));
  }
}

TEST_CASE("a diagonal weighs columns apart, and where nothing is known all alike") {
  const Moments known(std::vector<float>{1, 0, 3}, 3);
  CHECK_FALSE(known.is_full());
  CHECK(known.importance()[2] > 2.9F * known.importance()[0]);
  CHECK(known.importance()[1] > 0);
  for (const std::size_t count : {3, 9}) {
    const Moments unknown(std::vector<float>(count, 0.0F), 3);
    for (const float importance : unknown.importance()) CHECK(importance == unknown.importance()[0]);
  }
}

TEST_CASE("what are no moments is refused by its place") {
  constexpr float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  CHECK(refusal({1, 0, 0}, 2) == "moments: 3 values; needed are 2, or as many squared");
  CHECK(refusal({}, 2).starts_with("moments: 0 values"));
  CHECK(refusal({1, nan}, 2).starts_with("moments: row 1, column 1 is nan"));
  CHECK(refusal({1, -2}, 2).starts_with("moments: row 1, column 1 is -2: "));
  CHECK(refusal({1, inf, inf, 1}, 2).starts_with("moments: row 1, column 0 is inf: moments are finite"));
  CHECK(refusal({1, 0.5F, -0.5F, 1}, 2)
            .starts_with("moments: row 1, column 0 is -0.5: the matrix is symmetric"));
  CHECK(refusal({1, 2, 2, 1}, 2).starts_with("moments: not positive semidefinite"));
  CHECK_NOTHROW(Moments(std::vector<float>{1, 1, 1, 1}, 2));  // of rank one
}

TEST_CASE("threads and slabs do not show with moments either") {
  Random random(2);
  constexpr std::size_t rows = 50, cols = 300;
  std::vector<float> weights(rows * cols);
  for (float& weight : weights) weight = random.uniform(-1, 1);
  const Moments moments(some_moments(cols, 400, random), cols);
  const auto source = std::as_bytes(std::span(weights));
  for (const char* name : {"int3", "nl2", "nl2_16", "nl4_16", "bf16"}) {
    CAPTURE(name);
    const Format& form = format(name);
    std::vector<std::byte> one(packed_bytes(form, rows, cols)), many(one.size()), slabs(one.size());
    const PackReport report = pack_matrix(form, SourceType::f32, source, rows, cols, one, {}, 1, &moments);
    const PackReport same = pack_matrix(form, SourceType::f32, source, rows, cols, many, {}, 3, &moments);
    CHECK(one == many);
    CHECK(report.weighted_error > 0);
    CHECK(report.weighted_error == same.weighted_error);
    const std::size_t half = 32 * cols, bytes = 2 * tile_bytes(form, cols);
    pack_tiles(form, SourceType::f32, std::as_bytes(std::span(weights).first(half)), rows, cols, 0, 2,
               std::span(slabs).first(bytes), {}, &moments);
    pack_tiles(form, SourceType::f32, std::as_bytes(std::span(weights).subspan(half)), rows, cols, 2, 4,
               std::span(slabs).subspan(bytes), {}, &moments);
    CHECK(one == slabs);
  }
  std::vector<std::byte> turned(packed_bytes(format("int3"), cols, rows));
  CHECK_THROWS_AS(pack_matrix(format("int3"), SourceType::f32, source, cols, rows, turned, {}, 1, &moments),
                  Error);
}
