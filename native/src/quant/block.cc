#include "quant/block.h"

#include <algorithm>
#include <bit>

#include "quant/pack.h"

namespace edgert {

namespace {

// 2^(code - 128); halves of the smallest normal numbers are exact.
float half_power(unsigned code) noexcept {
  return std::bit_cast<float>(std::max(code << 23, std::uint32_t{0x00400000})) * 0.5F;
}

// What the codes of a format without minima stand for, but for the scale.
struct Centred {
  CodebookValues values;
  bool is_codebook;
  int zero;

  float operator()(std::uint8_t code) const noexcept {
    return static_cast<float>(is_codebook ? values[code] : code - zero);
  }
};

}  // namespace

float block_scale(const Format& format, const BlockRow& block) noexcept {
  return format.scale == ScaleType::e8m0 ? half_power(block.scale) : half_to_float(block.scale);
}

void dequantize(const Format& format, const BlockRow& block, float* weights) noexcept {
  const float unit = block_scale(format, block);
  const float minimum_unit = half_to_float(block.minimum);
  const int width = format.group;
  Centred centred{codebook_values(format.codebook), format.codebook != Codebook::none,
                  1 << (format.bits - 1)};
  const std::uint8_t* code = block.codes.data();
  for (std::size_t group = 0; group < static_cast<std::size_t>(format.block / width); ++group) {
    const float scale = format.has_blocks() ? unit * static_cast<float>(block.group_scales[group]) : unit;
    if (format.has_minima()) {
      const float minimum =
          format.has_blocks() ? minimum_unit * static_cast<float>(block.zeros[group]) : minimum_unit;
      for (int i = 0; i < width; ++i) *weights++ = scale * static_cast<float>(*code++) - minimum;
    } else {
      if (format.zero == ZeroType::u8) centred.zero = block.zeros[group];
      for (int i = 0; i < width; ++i) *weights++ = scale * centred(*code++);
    }
  }
}

}  // namespace edgert
