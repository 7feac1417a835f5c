#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "platform/error.h"
#include "quant/format.h"
#include "quant/pack.h"
#include "quant/random.h"
#include "support.h"

using namespace edgert;

namespace {

// Weights spread like a trained layer's, from a fixed generator.
std::vector<float> some_weights(std::size_t count, std::uint32_t seed = 1) {
  std::vector<float> weights(count);
  std::uint32_t state = seed;
  for (float& weight : weights) {
    float sum = 0;
    for (int i = 0; i < 6; ++i) {
      state = state * 1664525U + 1013904223U;
      sum += static_cast<float>(state >> 8) * 0x1p-24F - 0.5F;
    }
    weight = 0.03F * sum;
  }
  return weights;
}

struct Packed {
  std::vector<std::byte> bytes;
  PackReport report;
};

Packed pack(const Format& format, const std::vector<float>& weights, std::size_t rows, std::size_t cols) {
  Packed packed{std::vector<std::byte>(packed_bytes(format, rows, cols)), {}};
  packed.report = pack_tiles(format, SourceType::f32, std::as_bytes(std::span(weights)), rows, cols, 0,
                             (rows + kTileRows - 1) / kTileRows, packed.bytes);
  return packed;
}

// The formats that pack floats.
std::vector<Format> packers() {
  std::vector<Format> rows;
  for (const Format& row : formats()) {
    if (packs_floats(row)) rows.push_back(row);
  }
  return rows;
}

std::vector<float> unpack(const Format& format, const std::vector<std::byte>& packed, std::size_t rows,
                          std::size_t cols) {
  std::vector<float> weights(rows * cols);
  for (std::size_t row = 0; row < rows; ++row) {
    unpack_row(format, packed, rows, cols, row, std::span(weights).subspan(row * cols, cols));
  }
  return weights;
}

std::string refusal(const Format& format, std::vector<float> weights, std::size_t rows, std::size_t cols) {
  try {
    pack(format, weights, rows, cols);
  } catch (const Error& error) {
    CHECK(error.kind() == ErrorKind::invalid_argument);
    return error.what();
  }
  return {};
}

constexpr std::size_t kShapes[][2] = {{1, 1}, {15, 31}, {16, 32}, {17, 33}, {3, 1408}, {18, 2880}};

}  // namespace

TEST_CASE("the format table states the bits of the documentation") {
  CHECK(bits_per_weight(format("f32")) == 32);
  CHECK(bits_per_weight(format("int8")) == 8.5);
  CHECK(bits_per_weight(format("int4")) == 4.375);
  CHECK(bits_per_weight(format("int3")) == 3.375);
  CHECK(bits_per_weight(format("int2")) == 2.75);
  CHECK(bits_per_weight(format("nl2")) == 2.0625);
  CHECK(bits_per_weight(format("nl3_16")) == 3.3125);
  CHECK(packed_bytes(format("nl2_16"), 16, 256) == 1216);   // 1024 codes, 32 and 128 scales, 32 padding
  CHECK(packed_bytes(format("int4"), 17, 65) == 2 * 1152);  // 1024 codes, 64 scales, 32 zeros, 32 padding
  CHECK(packed_bytes(format("f16"), 1, 3) == 128);
  CHECK_THROWS_WITH_AS(
      format("int5"),
      "weight format 'int5' is unknown; known are f32, f16, bf16, int8, int4, int3, int2, int4_32, "
      "q4_0, q4_1, q5_0, q5_1, q2_k, q3_k, q4_k, q5_k, q6_k, iq4_nl, iq4_xs, mxfp4, "
      "affine2, affine3, affine4, affine5, affine6, affine8, affine2_32, affine3_32, affine6_32, affine8_32, "
      "nl2, nl2_16, nl3, nl3_16, nl4, nl4_16",
      Error);
  CHECK_THROWS_AS(packed_bytes(format("f32"), 0, 1), Error);
  CHECK_THROWS_AS(packed_bytes(format("f32"), 1, std::size_t{1} << 31), Error);
}

TEST_CASE("half and bfloat convert to the nearest, ties to even, and back exactly") {
  for (std::uint32_t bits = 0; bits < 0x10000U; ++bits) {
    const auto code = static_cast<std::uint16_t>(bits);
    const bool half_nan = (bits & 0x7fffU) > 0x7c00U;
    const bool bfloat_nan = (bits & 0x7fffU) > 0x7f80U;
    if (half_nan) CHECK(std::isnan(half_to_float(code)));
    if (!half_nan) CHECK(float_to_half(half_to_float(code)) == code);
    if (bfloat_nan) CHECK(std::isnan(bfloat_to_float(code)));
    if (!bfloat_nan) CHECK(float_to_bfloat(bfloat_to_float(code)) == code);
  }
  CHECK(half_to_float(0x0001) == 0x1p-24F);
  CHECK(half_to_float(0x7bff) == 65504.0F);
  for (std::uint16_t code = 0; code < 0x7bffU; ++code) {
    const float low = half_to_float(code);
    const float high = half_to_float(static_cast<std::uint16_t>(code + 1));
    const float middle = (low + high) / 2;
    CHECK(float_to_half(std::nextafter(middle, low)) == code);
    CHECK(float_to_half(middle) == code + (code & 1));
    CHECK(float_to_half(std::nextafter(middle, high)) == code + 1);
  }
  CHECK(float_to_half(65519.996F) == 0x7bff);
  CHECK(float_to_half(65520.0F) == 0x7c00);
  CHECK(float_to_bfloat(std::bit_cast<float>(0x3f808000U)) == 0x3f80);
  CHECK(float_to_bfloat(std::bit_cast<float>(0x3f818000U)) == 0x3f82);
  CHECK(std::isnan(bfloat_to_float(float_to_bfloat(std::bit_cast<float>(0x7f800001U)))));
}

TEST_CASE("every format and shape comes back within its own step") {
  for (const Format& form : packers()) {
    for (const auto& shape : kShapes) {
      const std::size_t rows = shape[0], cols = shape[1];
      CAPTURE(form.name);
      CAPTURE(rows);
      CAPTURE(cols);
      const std::vector<float> weights = some_weights(rows * cols);
      const Packed packed = pack(form, weights, rows, cols);
      const std::vector<float> back = unpack(form, packed.bytes, rows, cols);
      double squared_error = 0, squared_weight = 0, largest = 0;
      for (std::size_t i = 0; i < weights.size(); ++i) {
        const double error = static_cast<double>(weights[i]) - static_cast<double>(back[i]);
        squared_error += error * error;
        squared_weight += static_cast<double>(weights[i]) * static_cast<double>(weights[i]);
        largest = std::max(largest, std::fabs(error));
      }
      const double relative = std::sqrt(squared_error / squared_weight);
      const double allowed = form.bits == 32   ? 0
                             : form.bits == 16 ? 0.002
                             : form.bits == 8  ? 0.006
                                               : 1.5 / (1 << form.bits);
      CHECK(relative <= allowed);
      CHECK(packed.report.squared_error == doctest::Approx(squared_error).epsilon(1e-4));
      CHECK(packed.report.squared_weight == doctest::Approx(squared_weight).epsilon(1e-4));
      CHECK(packed.report.max_error == doctest::Approx(largest).epsilon(1e-4));
    }
  }
}

TEST_CASE("tiles packed apart are the tiles of the whole") {
  constexpr std::size_t rows = 50, cols = 100;
  const std::vector<float> weights = some_weights(rows * cols);
  for (const Format& form : packers()) {
    const Packed whole = pack(form, weights, rows, cols);
    const std::size_t one = tile_bytes(form, cols);
    for (std::size_t tile = 0; tile < 4; ++tile) {
      const std::size_t first = tile * kTileRows * cols;
      const std::size_t count = std::min<std::size_t>(kTileRows * cols, weights.size() - first);
      std::vector<std::byte> part(one);
      pack_tiles(form, SourceType::f32, std::as_bytes(std::span(weights).subspan(first, count)), rows, cols,
                 tile, tile + 1, part);
      CHECK(std::memcmp(part.data(), whole.bytes.data() + tile * one, one) == 0);
    }
  }
}

TEST_CASE("threads do not show: neither in the bytes nor in the report, and their errors arrive") {
  constexpr std::size_t rows = 150, cols = 70;
  std::vector<float> weights = some_weights(rows * cols);
  for (const Format& form : packers()) {
    const Packed alone = pack(form, weights, rows, cols);
    for (const int threads : {0, 1, 2, 5}) {
      std::vector<std::byte> packed(alone.bytes.size());
      const PackReport report = pack_matrix(form, SourceType::f32, std::as_bytes(std::span(weights)), rows,
                                            cols, packed, {}, threads);
      CHECK(packed == alone.bytes);
      CHECK(report.squared_error == alone.report.squared_error);
      CHECK(report.squared_weight == alone.report.squared_weight);
      CHECK(report.max_error == alone.report.max_error);
    }
  }
  weights[140 * cols] = std::numeric_limits<float>::infinity();
  std::vector<std::byte> packed(packed_bytes(format("int4"), rows, cols));
  CHECK_THROWS_WITH_AS(pack_matrix(format("int4"), SourceType::f32, std::as_bytes(std::span(weights)), rows,
                                   cols, packed, {}, 3),
                       "row 140, column 0 is inf: a weight must be a finite number; mend the checkpoint",
                       Error);
}

TEST_CASE("groups at the edges of the range") {
  constexpr std::size_t cols = 64;
  const auto check = [](std::vector<float> weights, float tolerance, bool codebooks = true) {
    for (const Format& form : packers()) {
      if (form.is_float() || (!codebooks && form.codebook != Codebook::none)) continue;
      const std::vector<float> back = unpack(form, pack(form, weights, 1, cols).bytes, 1, cols);
      for (std::size_t i = 0; i < cols; ++i) {
        CAPTURE(form.name);
        CAPTURE(i);
        CHECK(std::fabs(back[i] - weights[i]) <= tolerance * std::fabs(weights[i]));
      }
    }
  };
  SUBCASE("all zero") { check(std::vector<float>(cols, 0.0F), 0); }
  SUBCASE("constant") { check(std::vector<float>(cols, 0.37F), 0x1p-11F); }
  SUBCASE("constant and negative") { check(std::vector<float>(cols, -0.37F), 0x1p-11F); }
  SUBCASE("the smallest scale") { check(std::vector<float>(cols, 0x1p-24F), 0, false); }
  SUBCASE("a weight below the smallest scale") { check(std::vector<float>(cols, 0x1p-40F), 1); }
  SUBCASE("float denormals") { check(std::vector<float>(cols, 0x1p-140F), 1); }
  SUBCASE("two values of opposite sign") {
    std::vector<float> weights(cols, 0.5F);
    for (std::size_t i = 0; i < cols; i += 3) weights[i] = -0.5F;
    check(weights, 0x1p-11F);
  }
}

TEST_CASE("padding dequantises to zero, but for columns of codebooks, which lack it") {
  const std::vector<float> weights(17 * 33, 0.25F);
  for (const Format& form : packers()) {
    const std::vector<std::byte> packed = pack(form, weights, 17, 33).bytes;
    const std::size_t padded = padded_cols(form, 33);
    const std::vector<float> all =
        unpack(form, packed, 32, padded);  // the same bytes, with the padding shown
    for (std::size_t row = 0; row < 32; ++row) {
      for (std::size_t col = 0; col < padded; ++col) {
        const bool has_zero = form.codebook == Codebook::none;
        if (row >= 17 || (col >= 33 && has_zero)) CHECK(all[row * padded + col] == 0);
      }
    }
  }
}

TEST_CASE("what a format cannot hold is refused by row and column") {
  std::vector<float> weights = some_weights(20 * 70);
  weights[18 * 70 + 65] = std::numeric_limits<float>::quiet_NaN();
  for (const Format& form : packers())
    CHECK(refusal(form, weights, 20, 70).starts_with("row 18, column 65 is nan"));
  weights[18 * 70 + 65] = -std::numeric_limits<float>::infinity();
  for (const Format& form : packers())
    CHECK(refusal(form, weights, 20, 70).starts_with("row 18, column 65 is -inf"));
  weights[18 * 70 + 65] = std::numeric_limits<float>::max();
  CHECK(refusal(format("f32"), weights, 20, 70).empty());
  for (const Format& form : packers()) {
    if (form.id == FormatId::f32) continue;
    const std::string message = refusal(form, weights, 20, 70);
    CHECK(message.starts_with("row 18, column 65 is 3.4"));
    CHECK(message.ends_with("pack this tensor as f32"));
  }
  weights[18 * 70 + 65] = 65504.0F;
  for (const Format& form : packers()) CHECK(refusal(form, weights, 20, 70).empty());
}

TEST_CASE("the remainder carries what rounding lost") {
  constexpr std::size_t rows = 17, cols = 70;
  const std::vector<float> weights = some_weights(rows * cols);
  for (const Format& form : packers()) {
    std::vector<std::byte> packed(packed_bytes(form, rows, cols));
    std::vector<std::int8_t> remainder(rows * cols);
    const auto source = std::as_bytes(std::span(weights));
    if (form.is_float() || form.codebook != Codebook::none) {
      CHECK_THROWS_AS(pack_tiles(form, SourceType::f32, source, rows, cols, 0, 2, packed, remainder), Error);
      continue;
    }
    const PackReport report = pack_tiles(form, SourceType::f32, source, rows, cols, 0, 2, packed, remainder);
    const std::vector<float> back = unpack(form, packed, rows, cols);
    // Without remainders the bytes are the same.
    CHECK(pack(form, weights, rows, cols).bytes == packed);
    for (std::size_t i = 0; i < weights.size(); ++i) {
      // Half a scale is 100 steps; a clipped weight may need more than int8 has.
      if (std::abs(remainder[i]) == 127) continue;
      const double error = static_cast<double>(weights[i]) - static_cast<double>(back[i]);
      CHECK(std::fabs(error) <= report.max_error * 1.0001);
      if (remainder[i] == 0) CHECK(std::fabs(error) <= report.max_error / 50);
      if (remainder[i] != 0) CHECK((error > 0) == (remainder[i] > 0));
    }
  }
}

TEST_CASE("sizes that disagree are refused") {
  const std::vector<float> weights = some_weights(16 * 32);
  std::vector<std::byte> packed(packed_bytes(format("int8"), 16, 32));
  const auto source = std::as_bytes(std::span(weights));
  const auto into = [&](std::span<const std::byte> from, std::size_t tiles, std::span<std::byte> to) {
    pack_tiles(format("int8"), SourceType::f32, from, 16, 32, 0, tiles, to);
  };
  CHECK_NOTHROW(into(source, 1, packed));
  CHECK_THROWS_AS(into(source.first(source.size() - 1), 1, packed), Error);
  CHECK_THROWS_AS(into(source, 1, std::span(packed).first(64)), Error);
  CHECK_THROWS_AS(into(source, 2, packed), Error);
  std::vector<float> row(32);
  CHECK_THROWS_AS(unpack_row(format("int8"), packed, 16, 32, 16, row), Error);
  CHECK_THROWS_AS(unpack_row(format("int8"), packed, 16, 33, 0, row), Error);
}

TEST_CASE(
    "random weights have the deviation asked for, a mean of zero, and the same bytes for the same seed") {
  const std::size_t rows = 72, cols = 1024;  // the last tile is half empty
  for (const Format& format : formats()) {
    CAPTURE(format.name);
    std::vector<std::byte> packed(packed_bytes(format, rows, cols), std::byte{0xff});
    fill_random(format, rows, cols, 0.02F, 7, packed);
    double sum = 0, squared = 0;
    for (const float weight : unpack(format, packed, rows, cols)) {
      sum += static_cast<double>(weight);
      squared += static_cast<double>(weight) * static_cast<double>(weight);
    }
    const double count = static_cast<double>(rows * cols);
    CHECK(std::sqrt(squared / count) == doctest::Approx(0.02).epsilon(0.02));
    CHECK(std::fabs(sum / count) < 0.02 * 8 / std::sqrt(count));
    auto again = packed;
    fill_random(format, rows, cols, 0.02F, 7, again);
    CHECK(again == packed);
    fill_random(format, rows, cols, 0.02F, 8, again);
    CHECK(again != packed);
  }
}

TEST_CASE("random weights refuse what they cannot fill") {
  std::vector<std::byte> space(packed_bytes(format("int4"), 16, 96));
  const auto fill = [&](std::size_t cols, float deviation) {
    return test::error_of(ErrorKind::invalid_argument,
                          [&] { fill_random(format("int4"), 16, cols, deviation, 0, space); });
  };
  CHECK(test::contains(fill(96, 1.0F), "a multiple of 64"));
  CHECK(test::contains(fill(128, 1e9F), "deviation"));
  CHECK(test::contains(fill(128, 0.0F), "deviation"));
  CHECK(test::contains(fill(64, 1.0F), "destination"));
}
