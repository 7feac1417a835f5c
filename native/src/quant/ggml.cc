#include "quant/ggml.h"

#include <array>
#include <cstring>
#include <string>

#include "platform/error.h"
#include "quant/tile.h"

namespace edgert {

namespace {

constexpr std::uint16_t kSign = 0x8000;

std::uint8_t byte_at(const std::byte* from, std::size_t i) noexcept {
  return std::to_integer<std::uint8_t>(from[i]);
}

// `count` bytes: their low halves, then, `apart` columns on, their high halves.
void read_nibbles(const std::byte* from, std::size_t count, std::size_t apart, std::uint8_t* codes) noexcept {
  for (std::size_t i = 0; i < count; ++i) {
    codes[i] = byte_at(from, i) & 15;
    codes[i + apart] = byte_at(from, i) >> 4;
  }
}

constexpr std::size_t kWord = sizeof(std::uint64_t);

void add_to_word(std::uint8_t* codes, std::uint64_t bits) noexcept {
  std::uint64_t word;
  std::memcpy(&word, codes, kWord);
  word |= bits;
  std::memcpy(codes, &word, kWord);
}

// Adds `bits` bits of each of 32 bytes, from bit `shift` on, to the codes of 32 columns at bit `lift`.
void add_bits(const std::byte* from, unsigned shift, unsigned bits, unsigned lift,
              std::uint8_t* codes) noexcept {
  const std::uint64_t mask = each_byte((1U << bits) - 1);
  for (std::size_t i = 0; i < 32; i += kWord) {
    add_to_word(codes + i, ((load<std::uint64_t>(from + i) >> shift) & mask) << lift);
  }
}

// A bit a column, 32 of them from `from` on, to bit 4.
void add_fifth_bits(const std::byte* from, std::uint8_t* codes) noexcept {
  constexpr std::uint64_t kBitOfByte = 0x8040201008040201U;
  for (std::size_t i = 0; i < 4; ++i) {
    const std::uint64_t chosen = each_byte(byte_at(from, i)) & kBitOfByte;  // not zero where the bit is set
    add_to_word(codes + kWord * i, ((chosen + each_byte(0x7f)) >> 7 & each_byte(1)) << 4);
  }
}

void read_q8_0(const std::byte* from, BlockRow& to) {
  to.scale = load<std::uint16_t>(from);
  for (std::size_t i = 0; i < 32; ++i) to.codes[i] = byte_at(from, 2 + i) ^ 0x80;
}

void read_q4_0(const std::byte* from, BlockRow& to) {  // iq4_nl as well
  to.scale = load<std::uint16_t>(from);
  read_nibbles(from + 2, 16, 16, to.codes.data());
}

void read_q4_1(const std::byte* from, BlockRow& to) {
  to.scale = load<std::uint16_t>(from);
  to.minimum = load<std::uint16_t>(from + 2) ^ kSign;  // there it is added
  read_nibbles(from + 4, 16, 16, to.codes.data());
}

void read_q5_0(const std::byte* from, BlockRow& to) {
  to.scale = load<std::uint16_t>(from);
  read_nibbles(from + 6, 16, 16, to.codes.data());
  add_fifth_bits(from + 2, to.codes.data());
}

void read_q5_1(const std::byte* from, BlockRow& to) {
  to.scale = load<std::uint16_t>(from);
  to.minimum = load<std::uint16_t>(from + 2) ^ kSign;
  read_nibbles(from + 8, 16, 16, to.codes.data());
  add_fifth_bits(from + 4, to.codes.data());
}

void read_q2_k(const std::byte* from, BlockRow& to) {
  to.scale = load<std::uint16_t>(from + 80);
  to.minimum = load<std::uint16_t>(from + 82);
  for (std::size_t g = 0; g < 16; ++g) {
    to.group_scales[g] = byte_at(from, g) & 15;
    to.zeros[g] = byte_at(from, g) >> 4;
  }
  to.codes.fill(0);
  for (std::size_t i = 0; i < 8; ++i) {
    add_bits(from + 16 + i / 4 * 32, static_cast<unsigned>(i % 4 * 2), 2, 0, to.codes.data() + 32 * i);
  }
}

void read_q3_k(const std::byte* from, BlockRow& to) {
  const std::byte *const high = from, *const low = from + 32, *const scales = from + 96;
  to.scale = load<std::uint16_t>(from + 108);
  for (std::size_t g = 0; g < 16; ++g) {
    const int four = g < 8 ? byte_at(scales, g) & 15 : byte_at(scales, g - 8) >> 4;
    const int two = (byte_at(scales, 8 + g % 4) >> (g / 4 * 2)) & 3;
    to.group_scales[g] = static_cast<std::int8_t>((four | two << 4) - 32);
  }
  to.codes.fill(0);
  for (std::size_t i = 0; i < 8; ++i) {
    std::uint8_t* const codes = to.codes.data() + 32 * i;
    add_bits(low + i / 4 * 32, static_cast<unsigned>(i % 4 * 2), 2, 0, codes);
    add_bits(high, static_cast<unsigned>(i), 1, 2, codes);
  }
}

// Scales and minima of q4_k and q5_k: 6 bits each, the upper two of the last four in the bytes of the first.
void read_pairs_of_six(const std::byte* from, BlockRow& to) noexcept {
  for (std::size_t g = 0; g < 4; ++g) {
    const unsigned scale = byte_at(from, g), minimum = byte_at(from, 4 + g), rest = byte_at(from, 8 + g);
    to.group_scales[g] = static_cast<std::int8_t>(scale & 63);
    to.zeros[g] = static_cast<std::uint8_t>(minimum & 63);
    to.group_scales[4 + g] = static_cast<std::int8_t>((rest & 15) | (scale >> 6) << 4);
    to.zeros[4 + g] = static_cast<std::uint8_t>((rest >> 4) | (minimum >> 6) << 4);
  }
}

void read_q4_k(const std::byte* from, BlockRow& to) {
  to.scale = load<std::uint16_t>(from);
  to.minimum = load<std::uint16_t>(from + 2);
  read_pairs_of_six(from + 4, to);
  for (std::size_t i = 0; i < 4; ++i) read_nibbles(from + 16 + 32 * i, 32, 32, to.codes.data() + 64 * i);
}

void read_q5_k(const std::byte* from, BlockRow& to) {
  to.scale = load<std::uint16_t>(from);
  to.minimum = load<std::uint16_t>(from + 2);
  read_pairs_of_six(from + 4, to);
  for (std::size_t i = 0; i < 4; ++i) read_nibbles(from + 48 + 32 * i, 32, 32, to.codes.data() + 64 * i);
  for (std::size_t i = 0; i < 8; ++i) {
    add_bits(from + 16, static_cast<unsigned>(i), 1, 4, to.codes.data() + 32 * i);
  }
}

void read_q6_k(const std::byte* from, BlockRow& to) {
  const std::byte* const high = from + 128;
  to.scale = load<std::uint16_t>(from + 208);
  for (std::size_t g = 0; g < 16; ++g) to.group_scales[g] = load<std::int8_t>(from + 192 + g);
  for (std::size_t half = 0; half < 2; ++half) {
    std::uint8_t* const codes = to.codes.data() + 128 * half;
    read_nibbles(from + 64 * half, 64, 64, codes);
    for (std::size_t i = 0; i < 4; ++i) {
      add_bits(high + 32 * half, static_cast<unsigned>(2 * i), 2, 4, codes + 32 * i);
    }
  }
}

void read_iq4_xs(const std::byte* from, BlockRow& to) {
  to.scale = load<std::uint16_t>(from);
  const unsigned high = load<std::uint16_t>(from + 2);
  for (std::size_t g = 0; g < 8; ++g) {
    const unsigned four = (byte_at(from, 4 + g / 2) >> (g % 2 * 4)) & 15U;
    to.group_scales[g] = static_cast<std::int8_t>((four | ((high >> (2 * g)) & 3) << 4) - 32);
    read_nibbles(from + 8 + 16 * g, 16, 16, to.codes.data() + 32 * g);
  }
}

void read_mxfp4(const std::byte* from, BlockRow& to) {
  to.scale = byte_at(from, 0);
  read_nibbles(from + 1, 16, 16, to.codes.data());
}

constexpr std::array kBlockTypes{
    BlockType{"Q4_0", 18, FormatId::q4_0, read_q4_0},
    BlockType{"Q4_1", 20, FormatId::q4_1, read_q4_1},
    BlockType{"Q5_0", 22, FormatId::q5_0, read_q5_0},
    BlockType{"Q5_1", 24, FormatId::q5_1, read_q5_1},
    BlockType{"Q8_0", 34, FormatId::int8, read_q8_0},
    BlockType{"Q2_K", 84, FormatId::q2_k, read_q2_k},
    BlockType{"Q3_K", 110, FormatId::q3_k, read_q3_k},
    BlockType{"Q4_K", 144, FormatId::q4_k, read_q4_k},
    BlockType{"Q5_K", 176, FormatId::q5_k, read_q5_k},
    BlockType{"Q6_K", 210, FormatId::q6_k, read_q6_k},
    BlockType{"IQ4_NL", 18, FormatId::iq4_nl, read_q4_0},
    BlockType{"IQ4_XS", 136, FormatId::iq4_xs, read_iq4_xs},
    BlockType{"MXFP4", 17, FormatId::mxfp4, read_mxfp4},
};

}  // namespace

std::span<const BlockType> block_types() noexcept { return kBlockTypes; }

const BlockType& block_type(std::string_view name) {
  std::string known;
  for (const BlockType& type : kBlockTypes) {
    if (type.name == name) return type;
    known += (known.empty() ? "" : ", ") + std::string(type.name);
  }
  throw Error(ErrorKind::unsupported,
              "block type '" + std::string(name) + "' is unknown; known are " + known);
}

}  // namespace edgert
