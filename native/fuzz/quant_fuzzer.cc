// Weights that a file holds quantised: whatever sizes and bytes, the answer is an Error or tiles that hold
// the same weights.
//
//     edgert_fuzz_quant -runs=1000000          (libFuzzer; its options)
#include <fuzzer/FuzzedDataProvider.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "platform/error.h"
#include "quant/pack.h"
#include "quant/repack.h"

namespace {

using namespace edgert;

void require(bool held, const char* promise) {
  if (held) return;
  std::fprintf(stderr, "not kept: %s\n", promise);
  std::abort();
}

bool same(float a, float b) { return std::memcmp(&a, &b, sizeof a) == 0 || (std::isnan(a) && std::isnan(b)); }

std::vector<float> unpacked(const Format& form, std::span<const std::byte> packed, std::size_t rows,
                            std::size_t cols) {
  std::vector<float> weights(rows * cols);
  for (std::size_t row = 0; row < rows; ++row)
    unpack_row(form, packed, rows, cols, row, std::span(weights).subspan(row * cols, cols));
  return weights;
}

// So many elements, now and then some more or fewer; what the input lacks repeats it.
template <class T>
std::vector<T> elements(FuzzedDataProvider& input, std::size_t count) {
  if (input.ConsumeProbability<float>() < 0.02F) count += input.ConsumeIntegralInRange<std::size_t>(0, 3) - 1;
  if (count > (1u << 20)) count = 0;  // sizes that are out of range have no bytes
  const auto drawn = input.ConsumeBytes<std::uint8_t>(std::min<std::size_t>(count * sizeof(T), 64));
  std::vector<T> made(count);
  auto* const bytes = reinterpret_cast<std::uint8_t*>(made.data());
  for (std::size_t at = 0; at < count * sizeof(T) && !drawn.empty(); ++at)
    bytes[at] = static_cast<std::uint8_t>(drawn[at % drawn.size()] ^ (at / drawn.size() * 37 & 0x33));
  return made;
}

std::size_t dimension(FuzzedDataProvider& input, std::size_t unit, std::size_t most) {
  const std::size_t size = unit * input.ConsumeIntegralInRange<std::size_t>(1, most);
  switch (input.ConsumeIntegralInRange(0, 40)) {
    case 0:
      return size - 1;
    case 1:
      return std::size_t{1} << input.ConsumeIntegralInRange(20, 63);
    default:
      return size;
  }
}

void carry_over(FuzzedDataProvider& input) {
  const auto types = block_types();
  const BlockType& type = types[input.ConsumeIntegralInRange<std::size_t>(0, types.size() - 1)];
  const Format& form = format(type.format);
  const std::size_t rows = dimension(input, 1, 35), cols = dimension(input, type.elements(), 3);
  const std::size_t bytes = packed_bytes(form, rows, cols);
  if (bytes > (1u << 22)) return;
  const auto blocks = elements<std::byte>(input, rows * (cols / type.elements()) * type.bytes);
  std::vector<float> weights(rows * cols);
  dequantize(type, blocks, rows, cols, weights);
  std::vector<std::byte> packed(bytes, std::byte{0xff});
  repack(type, blocks, rows, cols, packed, 1);
  const std::vector<float> held = unpacked(form, packed, rows, cols);
  for (std::size_t at = 0; at < held.size(); ++at)
    require(same(held[at], weights[at]), "tiles hold the weights of the blocks");
}

void pack_parts(FuzzedDataProvider& input) {
  const auto known = formats();
  const Format& form = known[input.ConsumeIntegralInRange<std::size_t>(0, known.size() - 1)];
  const std::size_t rows = dimension(input, 1, 35), cols = dimension(input, 1, 300);
  const std::size_t bytes = packed_bytes(form, rows, cols);
  if (bytes > (1u << 22)) return;
  const std::size_t groups = padded_cols(form, cols) / static_cast<std::size_t>(form.group);
  const std::size_t values = rows * groups;
  const bool powers = form.scale == ScaleType::e8m0;
  auto codes = elements<std::uint8_t>(input, rows * cols);
  if (!form.is_float() && input.ConsumeProbability<float>() < 0.9F)
    for (auto& code : codes) code = static_cast<std::uint8_t>(code & ((1U << form.bits) - 1));
  auto scales = elements<float>(input, powers ? 0 : values),
       minima = elements<float>(input, form.has_minima() ? values : 0);
  if (input.ConsumeProbability<float>() < 0.9F)
    for (auto* floats : {&scales, &minima})
      for (float& value : *floats)
        value = half_to_float(static_cast<std::uint16_t>(
            std::lround(std::fmod(std::isfinite(value) ? value : 1.0F, 30000.0F)) & 0x7bff));
  const auto exponents = elements<std::uint8_t>(input, powers ? values : 0);
  const auto zeros = elements<std::uint8_t>(input, form.zero == ZeroType::u8 ? values : 0);
  std::vector<std::byte> packed(bytes, std::byte{0xff});
  pack_codes(form, {codes, scales, exponents, zeros, minima}, rows, cols, packed, 1);
  const std::vector<float> held = unpacked(form, packed, rows, cols);
  if (form.codebook != Codebook::none) return;
  for (std::size_t row = 0; row < rows; ++row) {
    for (std::size_t col = 0; col < cols; ++col) {
      const std::size_t group = row * groups + col / static_cast<std::size_t>(form.group);
      const auto code = static_cast<float>(codes[row * cols + col]);
      const float zero =
          zeros.empty() ? static_cast<float>(1 << (form.bits - 1)) : static_cast<float>(zeros[group]);
      const float wanted =
          minima.empty() ? scales[group] * (code - zero) : scales[group] * code - minima[group];
      require(same(held[row * cols + col], wanted), "tiles hold codes under their scales");
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  FuzzedDataProvider input(data, size);
  try {
    input.ConsumeBool() ? carry_over(input) : pack_parts(input);
  } catch (const Error& error) {
    require(error.kind() == ErrorKind::invalid_argument || error.kind() == ErrorKind::unsupported,
            "an Error of input");
    require(std::strlen(error.what()) < 4096, "a message is short");
  }
  return 0;
}
