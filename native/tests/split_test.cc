// Matrices in two planes: the same bytes again, and a base that is the matrix in fewer bits.
#include "quant/split.h"

#include <doctest/doctest.h>

#include <cmath>
#include <vector>

#include "random_matrix.h"

namespace edgert {
namespace {

constexpr FormatId kSplit[] = {FormatId::int8, FormatId::int4, FormatId::int4_32};

struct Planes {
  std::vector<std::byte> base, refinement;
  bool same;
};

Planes planes_of(const Matrix& m) {
  const Format& f = format(m.format);
  Planes planes{std::vector<std::byte>(packed_bytes(format(*base_format(m.format)), m.rows, m.cols)),
                std::vector<std::byte>(refinement_bytes(f, m.rows, m.cols)), false};
  planes.same = split(f, m.rows, m.cols, m.packed, planes.base, planes.refinement);
  return planes;
}

TEST_CASE("base and refinement make the very bytes again") {
  Random random(3);
  for (const FormatId id : kSplit) {
    for (const std::size_t cols : {1, 32, 64, 100, 192, 320}) {
      const Matrix whole = random_matrix(id, 37, cols, random);
      const Planes planes = planes_of(whole);
      CAPTURE(format(id).name);
      CAPTURE(cols);
      CHECK(planes.same);
      std::vector<std::byte> again(whole.packed.size(), std::byte{0xee});
      join(format(id), whole.rows, whole.cols, planes.base, planes.refinement, again);
      CHECK(again == whole.packed);
    }
  }
}

TEST_CASE("a whole can be made where the planes lie, but for the base") {
  Random random(4);
  for (const FormatId id : kSplit) {
    for (const std::size_t cols : {32, 64, 192, 576}) {
      const Matrix whole = random_matrix(id, 96, cols, random);
      const Planes planes = planes_of(whole);
      std::vector<std::byte> slot = planes.base;
      slot.insert(slot.end(), planes.refinement.begin(), planes.refinement.end());
      REQUIRE(slot.size() >= whole.packed.size());
      const auto refinement = std::span(slot).subspan(planes.base.size());
      join(format(id), whole.rows, whole.cols, planes.base, refinement,
           std::span(slot).first(whole.packed.size()));
      slot.resize(whole.packed.size());
      CHECK(slot == whole.packed);
    }
  }
}

TEST_CASE("the base is the matrix to the middle of what the low bits can add") {
  Random random(5);
  for (const FormatId id : kSplit) {
    const Format& f = format(id);
    const Matrix whole = random_matrix(id, 32, 128, random);
    const Planes planes = planes_of(whole);
    CHECK(planes.base.size() * 100 < whole.packed.size() * 64);
    std::vector<float> exact(128), base(128);
    const TileLayout layout(f, 128);
    for (std::size_t row = 0; row < 32; ++row) {
      unpack_row(f, whole.packed, 32, 128, row, exact);
      unpack_row(format(*base_format(id)), planes.base, 32, 128, row, base);
      for (std::size_t k = 0; k < 128; ++k) {
        BlockRow block;
        layout.load_block(whole.packed.data() + row / 16 * layout.bytes(),
                          k / static_cast<std::size_t>(f.block), row % 16, block);
        const float scale = half_to_float(block.scale);
        // Half the steps of the low bits, and the rounding of a minimum of at most 255 scales to a half.
        const float middle = (static_cast<float>(1 << f.bits / 2) - 1) / 2;
        CHECK(std::fabs(exact[k] - base[k]) <= scale * (middle + 0.26F));
      }
    }
  }
}

TEST_CASE("the smallest scales keep their zeros") {
  for (const FormatId id : {FormatId::int4, FormatId::int4_32}) {
    for (std::uint16_t bits = 1; bits < 70; ++bits) {
      for (unsigned zero = 0; zero < 256; zero += 3) {
        const Matrix whole = integer_matrix(
            id, 16, 64, [](std::size_t row, std::size_t k) { return (row + k) % 16; },
            [&] {
              BlockRow block;
              block.scale = bits;
              for (auto& one : block.zeros) one = static_cast<std::uint8_t>(zero);
              return block;
            });
        CHECK(planes_of(whole).same);
      }
    }
  }
}

TEST_CASE("what two planes cannot hold is told") {
  const auto with = [](FormatId id, float scale, std::uint8_t zero) {
    return planes_of(integer_matrix(
                         id, 16, 64, [](std::size_t, std::size_t) { return 1; },
                         [&] {
                           BlockRow block;
                           block.scale = float_to_half(scale);
                           for (auto& one : block.zeros) one = zero;
                           return block;
                         }))
        .same;
  };
  CHECK(with(FormatId::int4, 4000, 15));
  CHECK_FALSE(with(FormatId::int4, 20000, 2));  // four times as much is no half
  CHECK_FALSE(with(FormatId::int4, 8000, 15));  // nor is the minimum
  CHECK(with(FormatId::int4, 0, 0));
  CHECK_FALSE(with(FormatId::int4, 0, 3));
  CHECK_FALSE(with(FormatId::int8, 1000, 0));
}

TEST_CASE("any bytes can be joined") {
  Random random(6);
  for (const FormatId id : kSplit) {
    Planes planes = planes_of(random_matrix(id, 16, 64, random));
    for (auto* bytes : {&planes.base, &planes.refinement}) {
      for (std::byte& byte : *bytes) byte = static_cast<std::byte>(random.below(256));
    }
    std::vector<std::byte> out(packed_bytes(format(id), 16, 64));
    join(format(id), 16, 64, planes.base, planes.refinement, out);
  }
  CHECK_FALSE(base_format(FormatId::int3).has_value());
  CHECK_FALSE(base_format(FormatId::f16).has_value());
}

}  // namespace
}  // namespace edgert
