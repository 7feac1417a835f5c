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
#include "quant/layout.h"
#include "quant/pack.h"

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

// A matrix packed as docs/bundle-format.md says, and its weights in double precision.
struct Matrix {
  FormatId format;
  std::size_t rows, cols;
  std::vector<std::byte> packed;
  std::vector<double> weights;  // [rows][cols]
  std::vector<double> minima;   // what has been subtracted from them; empty where nothing has
};

Matrix random_float_matrix(FormatId id, std::size_t rows, std::size_t cols, Random& random) {
  Matrix matrix{id, rows, cols, std::vector<std::byte>(packed_bytes(format(id), rows, cols)), {}, {}};
  const std::size_t size = id == FormatId::f32 ? 4 : 2;
  for (std::size_t row = 0; row < rows; ++row) {
    std::byte* tile = matrix.packed.data() + row / 16 * tile_bytes(format(id), cols);
    for (std::size_t k = 0; k < cols; ++k) {
      float value = random.uniform(-2, 2);
      if (id == FormatId::f32) {
        std::memcpy(tile + (k * 16 + row % 16) * size, &value, size);
      } else {
        const bool half = id == FormatId::f16;
        if (half && k % 7 == 0) value *= 0x1p-16f;  // subnormal halves as well
        const std::uint16_t bits = half ? float_to_half(value) : float_to_bfloat(value);
        value = half ? half_to_float(bits) : bfloat_to_float(bits);
        std::memcpy(tile + (k * 16 + row % 16) * size, &bits, size);
      }
      matrix.weights.push_back(value);
    }
  }
  return matrix;
}

// Scales, zeros and minima of every size that the format has.
BlockRow random_scales(const Format& f, Random& random) {
  BlockRow block;
  const auto half = [&](float low, float high) { return float_to_half(random.uniform(low, high)); };
  const bool centred = f.has_blocks() || f.codebook != Codebook::none;  // scales may be negative
  block.scale = f.scale == ScaleType::e8m0 ? static_cast<std::uint16_t>(110 + random.below(20))
                                           : half(centred ? -0.1f : 0.001f, 0.1f);
  block.minimum = half(-0.5f, 0.5f);
  for (std::int8_t& scale : block.group_scales) {
    const unsigned low = f.scale == ScaleType::u4 ? random.below(16) : random.below(256);
    scale = static_cast<std::int8_t>(low);
  }
  for (std::uint8_t& zero : block.zeros) {
    zero = static_cast<std::uint8_t>(random.below(f.zero == ZeroType::min_u4 ? 16 : 256));
  }
  return block;
}

// What the numbers of a block stand for, without rounding.
double exact_weight(const Format& f, const BlockRow& block, std::size_t column) {
  const std::size_t group = column / static_cast<std::size_t>(f.group);
  double scale = f.scale == ScaleType::e8m0 ? std::ldexp(1.0, block.scale - 128)
                                            : static_cast<double>(half_to_float(block.scale));
  if (f.has_blocks()) scale *= block.group_scales[group];
  const int code = block.codes[column];
  if (f.codebook != Codebook::none)
    return scale * codebook_values(f.codebook)[static_cast<std::size_t>(code)];
  if (f.has_minima()) return scale * code;
  return scale * (code - (f.zero == ZeroType::u8 ? block.zeros[0] : 1 << (f.bits - 1)));
}

double exact_minimum(const Format& f, const BlockRow& block, std::size_t column) {
  const double unit = half_to_float(block.minimum);
  return f.has_blocks() ? unit * block.zeros[column / static_cast<std::size_t>(f.group)] : unit;
}

// `code(row, column)` gives the code of columns that exist; scales and zeros are random.
template <class Code>
Matrix integer_matrix(FormatId id, std::size_t rows, std::size_t cols, Random& random, Code&& code) {
  const Format& f = format(id);
  Matrix matrix{id, rows, cols, std::vector<std::byte>(packed_bytes(f, rows, cols)), {}, {}};
  matrix.weights.resize(rows * cols);
  if (f.has_minima()) matrix.minima.resize(rows * cols);
  const TileLayout layout(f, cols);
  const auto width = static_cast<std::size_t>(f.block);
  for (std::size_t b = 0; b < layout.blocks(); ++b) {
    for (std::size_t first = 0; first < rows; first += kTileRows) {
      std::vector<BlockRow> blocks(kTileRows);
      for (std::size_t row = first; row < std::min(first + kTileRows, rows); ++row) {
        BlockRow& block = blocks[row - first];
        block = random_scales(f, random);
        for (std::size_t k = b * width; k < std::min((b + 1) * width, cols); ++k) {
          block.codes[k - b * width] = static_cast<std::uint8_t>(code(row, k));
          double& weight = matrix.weights[row * cols + k];
          weight = exact_weight(f, block, k - b * width);
          if (!f.has_minima()) continue;
          matrix.minima[row * cols + k] = exact_minimum(f, block, k - b * width);
          weight -= matrix.minima[row * cols + k];
        }
      }
      std::byte* const tile = matrix.packed.data() + first / kTileRows * layout.bytes();
      layout.store_block(tile, b, std::span<const BlockRow, kTileRows>(blocks));
    }
  }
  return matrix;
}

Matrix random_matrix(FormatId id, std::size_t rows, std::size_t cols, Random& random) {
  if (format(id).is_float()) return random_float_matrix(id, rows, cols, random);
  return integer_matrix(id, rows, cols, random,
                        [&](std::size_t, std::size_t) { return random.below(1u << format(id).bits); });
}

struct Activations {
  std::size_t m, cols;
  std::vector<float> x;  // [m][cols]
  std::vector<std::int8_t> codes;
  std::vector<float> scales;
  std::vector<std::int32_t> sums;
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
      CHECK(a.sums == expected.sums);
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
    CHECK(a.sums[0] == 0);
    CHECK(std::vector<int>(a.codes.begin() + 32, a.codes.begin() + 36) == std::vector<int>{127, 0, 2, -2});
    CHECK(a.sums[1] == 127);
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
