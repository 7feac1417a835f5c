// Matrix products and quantised activations of every table this processor runs, against double precision and
// against the scalar table.
#include "kernels/kernels.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "kernels_support.h"
#include "platform/cpu.h"
#include "platform/error.h"
#include "random_matrix.h"

namespace edgert {
namespace {

constexpr std::size_t kRows[] = {1, 15, 16, 17, 100};
constexpr std::size_t kCols[] = {1, 31, 33, 64, 100, 1408};

std::vector<FormatId> integer_formats() {
  std::vector<FormatId> ids;
  for (const Format& f : formats()) {
    if (!f.is_float()) ids.push_back(f.id);
  }
  return ids;
}

struct Activations {
  std::size_t m, cols;
  std::vector<float> x;  // [m][cols]
  std::vector<std::int8_t> codes;
  std::vector<float> scales;
  std::vector<GroupSum> sums;
  std::size_t padded;

  Activations(const KernelTable& table, std::size_t rows, std::size_t columns, Random& random)
      : Activations(table, columns, random_vector(rows * columns, -3, 3, random)) {}
  Activations(const KernelTable& table, std::size_t columns, std::vector<float> values)
      : m(values.size() / columns), cols(columns), x(std::move(values)), padded((columns + 255) / 256 * 256) {
    codes.resize(m * padded);
    scales.resize(m * padded / 32);
    sums.resize(m * padded / 32);
    for (std::size_t r = 0; r < m; ++r) {
      table.quantize(x.data() + r * cols, cols, padded, codes.data() + r * padded,
                     scales.data() + r * padded / 32, sums.data() + r * padded / 32);
    }
  }
  // What a product really meets: the activation itself or what its code stands for.
  double value(bool is_float, std::size_t r, std::size_t k) const {
    if (is_float) return x[r * cols + k];
    return static_cast<double>(scales[(r * padded + k) / 32]) * codes[r * padded + k];
  }
};

constexpr float kUntouched = 12345.0f;

struct Product {
  std::size_t y_stride;
  std::vector<float> y;
};

MatMul work_of(const Matrix& matrix, Activations& a, Product& product) {
  MatMul work;
  work.format = matrix.format;
  work.weights = matrix.packed.data();
  work.rows = matrix.rows;
  work.cols = matrix.cols;
  work.x = a.x.data();
  work.x_stride = a.cols;
  work.quantized = {a.codes.data(), a.scales.data(), a.sums.data(), a.padded};
  work.m = a.m;
  product.y_stride = matrix.rows + 3;
  product.y.assign(a.m * product.y_stride, kUntouched);
  work.y = product.y.data();
  work.y_stride = product.y_stride;
  return work;
}

std::size_t tiles(const Matrix& matrix) { return (matrix.rows + 15) / 16; }

std::vector<float> multiply(const KernelTable& table, const Matrix& matrix, Activations& a) {
  Product product;
  table.matmul(work_of(matrix, a, product), 0, tiles(matrix));
  return product.y;
}

void check_against_double(const Matrix& matrix, const Activations& a, const std::vector<float>& y) {
  const bool is_float = format(matrix.format).is_float();
  const std::size_t y_stride = matrix.rows + 3;
  for (std::size_t r = 0; r < a.m; ++r) {
    for (std::size_t row = 0; row < matrix.rows; ++row) {
      double expected = 0, magnitude = 1e-30;
      for (std::size_t k = 0; k < matrix.cols; ++k) {
        const double term = matrix.weights[row * matrix.cols + k] * a.value(is_float, r, k);
        expected += term;
        magnitude += std::fabs(term);
        if (matrix.minima.empty()) continue;
        magnitude += 2 * std::fabs(matrix.minima[row * matrix.cols + k] * a.value(is_float, r, k));
      }
      const double error = std::fabs(y[r * y_stride + row] - expected);
      CHECK_MESSAGE(error <= 2e-6 * magnitude, "m " << r << " row " << row << ": " << y[r * y_stride + row]);
    }
    for (std::size_t row = matrix.rows; row < y_stride; ++row) CHECK(y[r * y_stride + row] == kUntouched);
  }
}

TEST_CASE("every table multiplies every format and shape as double precision does") {
  Random random(1);
  for (std::string_view name : runnable_kernels()) {
    const KernelTable& table = kernels(name);
    for (const Format& f : formats()) {
      for (std::size_t rows : kRows) {
        for (std::size_t cols : kCols) {
          if (name == "scalar" && rows == 100 && cols == 1408) continue;  // slow, and nothing new
          CAPTURE(name);
          CAPTURE(f.name);
          CAPTURE(rows);
          CAPTURE(cols);
          const Matrix matrix = random_matrix(f.id, rows, cols, random);
          Activations a(table, 5, cols, random);
          check_against_double(matrix, a, multiply(table, matrix, a));
        }
      }
    }
  }
}

TEST_CASE("integer products equal the scalar table's bit for bit") {
  Random random(2);
  const KernelTable& scalar = kernels("scalar");
  for (FormatId id : integer_formats()) {
    for (std::size_t cols : kCols) {
      const Matrix matrix = random_matrix(id, 50, cols, random);
      Activations a(scalar, 31, cols, random);  // 16 + 8 + 4 + 2 + 1
      const std::vector<float> expected = multiply(scalar, matrix, a);
      for (std::string_view name : runnable_kernels()) {
        CAPTURE(name);
        CAPTURE(cols);
        CHECK(same_bits(multiply(kernels(name), matrix, a), expected));
      }
    }
  }
}

TEST_CASE("largest codes times largest activations do not saturate") {
  Random random(3);
  const KernelTable& scalar = kernels("scalar");
  for (FormatId id : integer_formats()) {
    const unsigned largest = (1u << format(id).bits) - 1;
    for (float sign : {1.0f, -1.0f}) {
      const Matrix high =
          integer_matrix(id, 16, 64, random, [&](std::size_t, std::size_t) { return largest; });
      const Matrix mixed =
          integer_matrix(id, 16, 64, random, [&](std::size_t, std::size_t k) { return k % 2 ? largest : 0; });
      Activations same(scalar, 64, std::vector<float>(64, sign * 4.0f));
      Activations alternating(scalar, 64, std::vector<float>(64, sign * 4.0f));
      for (std::size_t k = 0; k < 64; k += 2) alternating.x[k] = -alternating.x[k];
      alternating = Activations(scalar, 64, alternating.x);
      REQUIRE(std::abs(same.codes[0]) == 127);
      for (const Matrix* matrix : {&high, &mixed}) {
        for (Activations* a : {&same, &alternating}) {
          const std::vector<float> expected = multiply(scalar, *matrix, *a);
          check_against_double(*matrix, *a, expected);
          for (std::string_view name : runnable_kernels()) {
            CAPTURE(name);
            CHECK(same_bits(multiply(kernels(name), *matrix, *a), expected));
          }
        }
      }
    }
  }
}

TEST_CASE("the smallest and the largest scales, zeros and minima") {
  Random random(8);
  const KernelTable& scalar = kernels("scalar");
  const std::uint16_t halves[] = {0x0000, 0x0001, 0x03ff, 0x7bff, 0x8001, 0xfbff};
  const std::uint8_t powers[] = {0, 1, 2, 3, 127, 200};
  const std::int8_t integers[] = {-128, -1, 0, 127};
  const std::uint8_t zeros[] = {0, 1, 254, 255};
  for (FormatId id : integer_formats()) {
    const Format& f = format(id);
    const auto scales = [&] {
      BlockRow block;
      block.scale = f.scale == ScaleType::e8m0 ? powers[random.below(6)] : halves[random.below(6)];
      block.minimum = halves[random.below(6)];
      const bool nibbles = f.scale == ScaleType::u4 || f.scale == ScaleType::u4x2;
      for (auto& scale : block.group_scales) {
        scale = nibbles ? static_cast<std::int8_t>(15 * random.below(2)) : integers[random.below(4)];
      }
      for (auto& zero : block.zeros) {
        zero = nibbles ? static_cast<std::uint8_t>(15 * random.below(2)) : zeros[random.below(4)];
      }
      return block;
    };
    const unsigned largest = (1u << f.bits) - 1;
    const Matrix matrix = integer_matrix(
        id, 20, 768, [&](std::size_t, std::size_t) { return largest * random.below(2); }, scales);
    Activations a(scalar, 7, 768, random);
    const std::vector<float> expected = multiply(scalar, matrix, a);
    check_against_double(matrix, a, expected);
    for (std::string_view name : runnable_kernels()) {
      CAPTURE(name);
      CAPTURE(f.name);
      CHECK(same_bits(multiply(kernels(name), matrix, a), expected));
    }
  }
}

TEST_CASE("a row's result has the same bits alone, in any batch, through gather and for any split of tiles") {
  Random random(4);
  for (std::string_view name : runnable_kernels()) {
    const KernelTable& table = kernels(name);
    for (const Format& f : formats()) {
      CAPTURE(name);
      CAPTURE(f.name);
      const Matrix matrix = random_matrix(f.id, 50, 201, random);
      Activations all(table, 19, 201, random);
      const std::vector<float> batch = multiply(table, matrix, all);

      for (std::size_t m = 1; m < all.m; ++m) {
        Product part;
        MatMul work = work_of(matrix, all, part);
        work.m = m;
        for (std::size_t t = tiles(matrix); t-- > 0;) table.matmul(work, t, t + 1);
        CHECK(std::memcmp(part.y.data(), batch.data(), m * part.y_stride * sizeof(float)) == 0);
      }
      for (std::int32_t r = 0; r < 19; ++r) {
        Product gathered;
        MatMul work = work_of(matrix, all, gathered);
        const std::int32_t rows[] = {r, 18 - r, r};
        work.gather = rows;
        work.m = 3;
        table.matmul(work, 0, tiles(matrix));
        for (std::size_t m = 0; m < 3; ++m) {
          CHECK(std::memcmp(gathered.y.data() + m * gathered.y_stride,
                            batch.data() + static_cast<std::size_t>(rows[m]) * gathered.y_stride,
                            gathered.y_stride * sizeof(float)) == 0);
        }
      }
    }
  }
}

TEST_CASE("the bias is added last") {
  Random random(5);
  for (std::string_view name : runnable_kernels()) {
    const KernelTable& table = kernels(name);
    const Matrix matrix = random_matrix(FormatId::int4, 21, 64, random);
    Activations a(table, 2, 64, random);
    const std::vector<float> plain = multiply(table, matrix, a);
    const std::vector<float> bias = random_vector(21, -1, 1, random);
    Product product;
    MatMul work = work_of(matrix, a, product);
    work.bias = bias.data();
    table.matmul(work, 0, tiles(matrix));
    for (std::size_t m = 0; m < 2; ++m) {
      for (std::size_t row = 0; row < 21; ++row) {
        CHECK(product.y[m * product.y_stride + row] == plain[m * product.y_stride + row] + bias[row]);
      }
    }
  }
}

TEST_CASE("quantised activations are the same on every table and within half a step") {
  Random random(6);
  for (std::size_t cols : {1u, 31u, 33u, 64u, 100u}) {
    const std::vector<float> x = random_vector(cols, -5, 5, random);
    const Activations expected(kernels("scalar"), cols, x);
    for (std::size_t k = 0; k < cols; ++k) {
      CHECK(std::fabs(expected.value(false, 0, k) - x[k]) <= 0.5001 * expected.scales[k / 32]);
    }
    for (std::string_view name : runnable_kernels()) {
      CAPTURE(name);
      const Activations a(kernels(name), cols, x);
      CHECK(a.codes == expected.codes);
      CHECK(std::memcmp(a.sums.data(), expected.sums.data(), a.sums.size() * sizeof(GroupSum)) == 0);
      CHECK(same_bits(a.scales, expected.scales));
    }
  }
}

TEST_CASE("quantising ties, zeros, subnormals and values that are not finite") {
  constexpr float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for (std::string_view name : runnable_kernels()) {
    CAPTURE(name);
    const KernelTable& table = kernels(name);
    std::vector<float> x(128, 0.0f);
    x[32] = 127, x[33] = 0.5f, x[34] = 1.5f, x[35] = -2.5f;
    x[64] = 190 * std::numeric_limits<float>::denorm_min();
    const Activations a(table, 128, x);
    CHECK(a.scales[0] == 0);
    CHECK(a.sums[0].all == 0);
    CHECK(std::vector<int>(a.codes.begin() + 32, a.codes.begin() + 36) == std::vector<int>{127, 0, 2, -2});
    CHECK(a.sums[1].all == 127);
    CHECK(a.sums[1].first_half == 127);
    CHECK(a.codes[64] == 127);
    for (float bad : {inf, -inf, nan}) {
      x[100] = bad;
      const Activations b(table, 128, x);
      CHECK(!std::isfinite(b.scales[3]));
      CHECK(std::all_of(b.codes.begin() + 96, b.codes.end(), [](int code) { return code == 0; }));
    }
  }
}

TEST_CASE("a table is offered where the processor has its instructions") {
  const auto offered = [](std::string_view name) {
    const auto names = runnable_kernels();
    return std::find(names.begin(), names.end(), name) != names.end();
  };
  CHECK(offered("avx2") == cpu_features().avx2);
  CHECK(offered("avxvnni") == cpu_features().avx_vnni);
  CHECK(offered("avx512") == cpu_features().avx512_vnni);
  CHECK(offered("neon") == cpu_features().neon_dot);
  CHECK(offered("neon-i8mm") == cpu_features().neon_i8mm);
  if (cpu_features().neon_i8mm) CHECK(runnable_kernels().back() == "neon-i8mm");
}

TEST_CASE("the best table is the default, and an unknown name is refused with those that can run") {
  const char* chosen = std::getenv("EDGERT_ISA");
  CHECK(kernels().name == (chosen ? chosen : runnable_kernels().back()));
  CHECK(runnable_kernels().front() == "scalar");
  try {
    kernels("mmx");
    FAIL("accepted");
  } catch (const Error& error) {
    CHECK(error.kind() == ErrorKind::unsupported);
    for (std::string_view name : runnable_kernels()) {
      CHECK(std::string_view(error.what()).find(name) != std::string_view::npos);
    }
  }
}

}  // namespace
}  // namespace edgert
