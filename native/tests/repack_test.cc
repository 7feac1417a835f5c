// Weights that are quantised already; tests/test_repack.py holds them against ggml's own.
#include "quant/repack.h"

#include <doctest/doctest.h>

#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "kernels_support.h"
#include "platform/error.h"
#include "quant/pack.h"
#include "support.h"

namespace edgert {
namespace {

constexpr std::uint16_t kHalfInfinity = 0x7c00;

// Random bytes; those that could be a scale that is not finite are not there.
std::vector<std::byte> random_blocks(const BlockType& type, std::size_t rows, std::size_t cols,
                                     Random& random) {
  std::vector<std::byte> blocks(rows * cols / type.elements() * type.bytes);
  for (std::byte& byte : blocks) byte = static_cast<std::byte>(random.below(256) & 0xbb);
  return blocks;
}

std::vector<std::byte> carried_over(const BlockType& type, const std::vector<std::byte>& blocks,
                                    std::size_t rows, std::size_t cols, int threads = 1) {
  std::vector<std::byte> packed(packed_bytes(format(type.format), rows, cols), std::byte{0xff});
  repack(type, blocks, rows, cols, packed, threads);
  return packed;
}

std::vector<float> unpacked(const Format& form, const std::vector<std::byte>& packed, std::size_t rows,
                            std::size_t cols) {
  std::vector<float> weights(rows * cols);
  for (std::size_t row = 0; row < rows; ++row) {
    unpack_row(form, packed, rows, cols, row, std::span(weights).subspan(row * cols, cols));
  }
  return weights;
}

TEST_CASE("blocks and the tiles that they are carried over into hold the same weights") {
  Random random(1);
  for (const BlockType& type : block_types()) {
    for (std::size_t rows : {1u, 16u, 35u}) {
      CAPTURE(type.name);
      CAPTURE(rows);
      const std::size_t cols = 3 * type.elements();
      const auto blocks = random_blocks(type, rows, cols, random);
      std::vector<float> weights(rows * cols);
      dequantize(type, blocks, rows, cols, weights);
      const auto packed = carried_over(type, blocks, rows, cols);
      CHECK(same_bits(unpacked(format(type.format), packed, rows, cols), weights));
      CHECK(carried_over(type, blocks, rows, cols, 3) == packed);
    }
  }
}

TEST_CASE("a block whose scale is not finite is refused by row and column") {
  Random random(2);
  for (const BlockType& type : block_types()) {
    CAPTURE(type.name);
    const std::size_t cols = 2 * type.elements();
    std::size_t refused = 0;
    for (std::size_t at = 0; at + 2 <= type.bytes; ++at) {
      auto blocks = random_blocks(type, 17, cols, random);
      std::byte* const block = blocks.data() + blocks.size() - type.bytes + at;
      if (type.format == FormatId::mxfp4) *block = std::byte{0xff};
      if (type.format != FormatId::mxfp4) std::memcpy(block, &kHalfInfinity, sizeof kHalfInfinity);
      try {
        carried_over(type, blocks, 17, cols);
      } catch (const Error& error) {
        ++refused;
        CHECK(error.kind() == ErrorKind::invalid_argument);
        CHECK(std::string(error.what()).starts_with("row 16, column " + std::to_string(type.elements())));
      }
    }
    CHECK(refused >= 1);
    CHECK(refused <= 3);  // a scale, a minimum, and what overlaps both
  }
}

TEST_CASE("sizes of blocks that disagree are refused") {
  Random random(3);
  const BlockType& type = block_type("Q6_K");
  const auto blocks = random_blocks(type, 16, 256, random);
  std::vector<std::byte> packed(packed_bytes(format(type.format), 16, 256));
  std::vector<float> weights(16 * 256);
  const auto refuses = [](const std::function<void()>& body) {
    test::error_of(ErrorKind::invalid_argument, body);
  };
  CHECK_NOTHROW(repack(type, blocks, 16, 256, packed, 1));
  refuses([&] { repack(type, blocks, 17, 256, packed, 1); });
  refuses([&] { repack(type, blocks, 16, 255, packed, 1); });
  refuses([&] { repack(type, blocks, 16, 256, std::span(packed).first(64), 1); });
  refuses([&] { repack(type, blocks, std::numeric_limits<std::size_t>::max() / 128, 256, packed, 1); });
  refuses([&] { dequantize(type, std::span(blocks).first(1), 16, 256, weights); });
  refuses([&] { dequantize(type, blocks, 16, 256, std::span(weights).first(1)); });
  CHECK(test::contains(test::error_of(ErrorKind::unsupported, [] { block_type("Q9_Z"); }),
                       "known are Q4_0, Q4_1"));
}

TEST_CASE("codes and scales apart come back as they were") {
  Random random(4);
  constexpr std::size_t rows = 19, cols = 100;
  for (const Format& form : formats()) {
    if (form.is_float() || form.has_blocks()) continue;
    CAPTURE(form.name);
    const std::size_t groups = padded_cols(form, cols) / static_cast<std::size_t>(form.group);
    std::vector<std::uint8_t> codes(rows * cols), bytes(rows * groups);
    std::vector<float> scales(rows * groups), minima(rows * groups);
    for (auto& code : codes) code = static_cast<std::uint8_t>(random.below(1u << form.bits));
    for (auto& byte : bytes) byte = static_cast<std::uint8_t>(random.below(255));
    for (auto* values : {&scales, &minima}) {
      for (float& value : *values) value = half_to_float(float_to_half(random.uniform(-1, 1)));
    }
    CodedMatrix source{.codes = codes, .scales = scales, .exponents = {}, .zeros = {}, .minima = {}};
    if (form.scale == ScaleType::e8m0) source.scales = {}, source.exponents = bytes;
    if (form.zero == ZeroType::u8) source.zeros = bytes;
    if (form.has_minima()) source.minima = minima;
    std::vector<std::byte> packed(packed_bytes(form, rows, cols));
    pack_codes(form, source, rows, cols, packed, 2);
    const std::vector<float> weights = unpacked(form, packed, rows, cols);

    for (std::size_t row = 0; row < rows; ++row) {
      std::vector<BlockRow> blocks(groups);
      for (std::size_t col = 0; col < cols; ++col) {
        const std::size_t group = col / static_cast<std::size_t>(form.group), at = row * groups + group;
        BlockRow& block = blocks[group];
        block.codes[col % static_cast<std::size_t>(form.group)] = codes[row * cols + col];
        block.scale = form.scale == ScaleType::e8m0 ? bytes[at] : float_to_half(scales[at]);
        block.minimum = float_to_half(minima[at]);
        block.zeros[0] = bytes[at];
      }
      std::vector<float> expected(padded_cols(form, cols));
      for (std::size_t group = 0; group < groups; ++group) {
        dequantize(form, blocks[group], expected.data() + group * static_cast<std::size_t>(form.group));
      }
      CHECK(std::memcmp(expected.data(), weights.data() + row * cols, cols * sizeof(float)) == 0);
    }
    codes[5 * cols + 7] = 255;
    const auto pack = [&] { pack_codes(form, source, rows, cols, packed, 2); };
    if (form.bits < 8) {
      CHECK(test::error_of(ErrorKind::invalid_argument, pack).starts_with("row 5, column 7: code 255"));
    } else {
      CHECK_NOTHROW(pack());
    }
  }
}

}  // namespace
}  // namespace edgert
