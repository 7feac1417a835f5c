#include "quant/repack.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <sstream>
#include <string>
#include <vector>

#include "platform/cpu.h"
#include "platform/error.h"
#include "platform/thread_pool.h"
#include "quant/layout.h"
#include "quant/pack.h"
#include "quant/tile.h"

namespace edgert {

namespace {

constexpr std::size_t kRows = kTileRows;

[[noreturn]] void refuse(std::size_t row, std::size_t col, const std::string& what) {
  throw Error(ErrorKind::invalid_argument,
              "row " + std::to_string(row) + ", column " + std::to_string(col) + ": " + what);
}

// Fills every tile from fill(row, block, BlockRow&), which gives the block of one row of the matrix.
template <class Fill>
void fill_tiles(const Format& format, std::size_t rows, std::size_t cols, std::span<std::byte> destination,
                int threads, Fill&& fill) {
  const TileLayout layout(format, cols);
  check_bytes("destination", destination.size(), packed_bytes(format, rows, cols));
  const int count = static_cast<int>(destination.size() / layout.bytes());
  ThreadPool pool(std::min(threads == 0 ? usable_cores() : threads, count));
  pool.run(count, 1, [&](int begin, int end, int) {
    std::vector<BlockRow> block(kRows);
    for (auto t = static_cast<std::size_t>(begin); t < static_cast<std::size_t>(end); ++t) {
      std::byte* const tile = destination.data() + t * layout.bytes();
      std::fill_n(tile, layout.bytes(), std::byte{0});
      const std::size_t present = std::min(kRows, rows - t * kRows);
      for (std::size_t r = present; r < kRows; ++r) block[r] = {};
      for (std::size_t b = 0; b < layout.blocks(); ++b) {
        for (std::size_t r = 0; r < present; ++r) fill(t * kRows + r, b, block[r]);
        layout.store_block(tile, b, std::span<const BlockRow, kRows>(block));
      }
    }
  });
}

std::size_t row_bytes(const BlockType& type, std::size_t cols) {
  if (cols % type.elements() != 0) {
    throw Error(ErrorKind::invalid_argument, std::to_string(cols) + " columns of " + std::string(type.name) +
                                                 ": needed is a multiple of " +
                                                 std::to_string(type.elements()));
  }
  return cols / type.elements() * type.bytes;
}

bool is_finite(const Format& format, const BlockRow& block) noexcept {
  return std::isfinite(half_to_float(block.minimum)) &&
         (format.scale == ScaleType::e8m0 ? block.scale != 0xff : std::isfinite(half_to_float(block.scale)));
}

std::uint16_t exact_half(const Format& format, const char* what, float value, std::size_t row,
                         std::size_t col) {
  const std::uint16_t half = float_to_half(value);
  if (half_to_float(half) == value && std::isfinite(value)) return half;
  std::ostringstream message;
  message << what << " " << value << " is no finite f16, which " << format.name
          << " needs; convert from floats";
  refuse(row, col, message.str());
}

[[noreturn]] void refuse_code(const Format& format, std::span<const std::uint8_t> codes, std::size_t row,
                              std::size_t first) {
  const auto large =
      std::find_if(codes.begin(), codes.end(), [&](unsigned code) { return code >> format.bits != 0; });
  refuse(row, first + static_cast<std::size_t>(large - codes.begin()),
         "code " + std::to_string(*large) + " has more than " + std::to_string(format.bits) + " bits");
}

void check_coded(const Format& format, const CodedMatrix& source, std::size_t rows, std::size_t cols) {
  if (format.is_float() || format.has_blocks()) {
    throw Error(ErrorKind::unsupported, "codes and scales apart do not make " + std::string(format.name) +
                                            "; formats with one scale a group can be made of them");
  }
  const std::size_t values = rows * (padded_cols(format, cols) / static_cast<std::size_t>(format.group));
  const bool powers = format.scale == ScaleType::e8m0;
  check_bytes("codes", source.codes.size_bytes(), rows * cols);
  check_bytes("scales", source.scales.size_bytes(), powers ? 0 : 4 * values);
  check_bytes("exponents", source.exponents.size_bytes(), powers ? values : 0);
  check_bytes("zeros", source.zeros.size_bytes(), format.zero == ZeroType::u8 ? values : 0);
  check_bytes("minima", source.minima.size_bytes(), format.has_minima() ? 4 * values : 0);
}

}  // namespace

void repack(const BlockType& type, std::span<const std::byte> source, std::size_t rows, std::size_t cols,
            std::span<std::byte> destination, int threads) {
  const Format& form = format(type.format);
  const std::size_t stride = row_bytes(type, cols);
  packed_bytes(form, rows, cols);  // which checks that rows * stride cannot overflow
  check_bytes("source", source.size(), rows * stride);
  fill_tiles(form, rows, cols, destination, threads, [&](std::size_t row, std::size_t b, BlockRow& block) {
    type.read(source.data() + row * stride + b * type.bytes, block);
    if (!is_finite(form, block)) {
      refuse(row, b * type.elements(), "the scale of this block is not a finite number; mend the file");
    }
  });
}

void dequantize(const BlockType& type, std::span<const std::byte> source, std::size_t rows, std::size_t cols,
                std::span<float> weights) {
  const Format& form = format(type.format);
  check_bytes("source", source.size(), rows * row_bytes(type, cols));
  check_bytes("weights", weights.size_bytes(), rows * cols * sizeof(float));
  BlockRow block;
  const std::byte* from = source.data();
  for (std::size_t at = 0; at < weights.size(); at += type.elements(), from += type.bytes) {
    type.read(from, block);
    dequantize(form, block, weights.data() + at);
  }
}

void pack_codes(const Format& form, const CodedMatrix& source, std::size_t rows, std::size_t cols,
                std::span<std::byte> destination, int threads) {
  check_coded(form, source, rows, cols);
  const auto width = static_cast<std::size_t>(form.group);
  const std::size_t groups = padded_cols(form, cols) / width;
  fill_tiles(form, rows, cols, destination, threads,
             [&](std::size_t row, std::size_t group, BlockRow& block) {
               const std::size_t at = row * groups + group, first = group * width;
               const std::size_t used = std::min(width, cols - first);
               if (form.scale == ScaleType::e8m0) {
                 block.scale = source.exponents[at];
                 if (block.scale == 0xff)
                   refuse(row, first, "scale 255 of e8m0 is no number; mend the checkpoint");
               } else {
                 block.scale = exact_half(form, "scale", source.scales[at], row, first);
               }
               if (form.has_minima())
                 block.minimum = exact_half(form, "minimum", source.minima[at], row, first);
               if (form.zero == ZeroType::u8) block.zeros[0] = source.zeros[at];
               const auto codes = source.codes.subspan(row * cols + first, used);
               unsigned bits = 0;
               for (const std::uint8_t code : codes) bits |= code;
               if (bits >> form.bits != 0) refuse_code(form, codes, row, first);
               std::copy(codes.begin(), codes.end(), block.codes.begin());
               std::fill(block.codes.begin() + static_cast<std::ptrdiff_t>(used),
                         block.codes.begin() + static_cast<std::ptrdiff_t>(width), std::uint8_t{0});
             });
}

}  // namespace edgert
