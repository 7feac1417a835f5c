// Patches of packed codes: exactly reversible, and what quantising the changed floats would give.
#include "adapters/patch.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels_support.h"
#include "quant/pack.h"

using namespace edgert;

namespace {

// One tile of random weights, packed, with its remainders and a delta at some of its places.
struct Tile {
  const Format& as;
  std::size_t cols;
  std::vector<float> weights;  // [16][cols]
  std::vector<std::byte> packed;
  std::vector<std::uint32_t> places;
  std::vector<float> values;
  std::vector<std::int8_t> remainders;

  Tile(std::string_view name, std::size_t cols_, std::size_t every, float size, Random& random)
      : as(format(name)), cols(cols_), weights(random_vector(kTileRows * cols, -1, 1, random)) {
    packed.resize(tile_bytes(as, cols));
    std::vector<std::int8_t> all(weights.size());
    pack_matrix(as, SourceType::f32, std::as_bytes(std::span(weights)), kTileRows, cols, packed, all, 1);
    for (std::size_t place = every / 2; place < kTileRows * cols; place += every) {
      places.push_back(static_cast<std::uint32_t>(place));
      const std::size_t at = place % kTileRows * cols + place / kTileRows;
      remainders.push_back(all[at]);
    }
    values = random_vector(places.size(), -size, size, random);
  }

  TileDelta delta(float scale = 1) const { return {places, values.data(), remainders.data(), scale}; }
  std::vector<float> unpacked(const std::vector<std::byte>& of) const {
    std::vector<float> out(weights.size());
    for (std::size_t row = 0; row < kTileRows; ++row)
      unpack_row(as, of, kTileRows, cols, row, std::span(out).subspan(row * cols, cols));
    return out;
  }
};

const char* const kPatched[] = {"int8", "int4", "int4_32", "int3", "int2", "q4_0", "q5_0"};

}  // namespace

TEST_CASE("a patch taken off again leaves the very bytes, whatever the format and the gaps") {
  Random random(5);
  for (const char* name : kPatched) {
    for (const std::size_t every : {1U, 7U, 100U, 1900U}) {
      CAPTURE(name);
      CAPTURE(every);
      Tile tile(name, 300, every, 0.5F, random);
      const std::vector<std::byte> before = tile.packed;
      std::vector<PatchEntry> entries(patch_room(tile.as, tile.cols).entries(1, tile.places.size()));
      PatchCounts counts;
      const TileDelta delta = tile.delta();
      const std::size_t used =
          compile_patch(tile.as, tile.cols, std::span(&delta, 1), tile.packed.data(), entries.data(), counts);
      CHECK(used <= entries.size());
      entries.resize(used);
      CHECK(counts.values == tile.places.size());
      const std::vector<std::byte> patched = tile.packed;
      if (every < 1000) CHECK(patched != before);
      apply_patch(entries, tile.packed.data());
      CHECK(tile.packed == before);
      apply_patch(entries, tile.packed.data());
      CHECK(tile.packed == patched);
    }
  }
}

TEST_CASE("patched weights are the changed floats, within half a step unless clamped") {
  Random random(6);
  for (const char* name : kPatched) {
    CAPTURE(name);
    Tile tile(name, 128, 5, 0.2F, random);
    const std::vector<float> before = tile.unpacked(tile.packed);
    std::vector<PatchEntry> entries(patch_room(tile.as, tile.cols).entries(1, tile.places.size()));
    PatchCounts counts;
    const TileDelta delta = tile.delta(0.5F);
    compile_patch(tile.as, tile.cols, std::span(&delta, 1), tile.packed.data(), entries.data(), counts);
    const std::vector<float> after = tile.unpacked(tile.packed);
    // A step is the least by which two weights of a group differ, here in its first 16 columns.
    const auto step = [&](std::size_t row, std::size_t col) {
      float least = 1e9F;
      for (std::size_t a = col / 16 * 16; a < std::min(col / 16 * 16 + 16, tile.cols); ++a) {
        for (std::size_t b = col / 16 * 16; b < a; ++b) {
          const float apart = std::abs(before[row * tile.cols + a] - before[row * tile.cols + b]);
          if (apart > 1e-6F) least = std::min(least, apart);
        }
      }
      return least;
    };
    std::size_t beyond = 0;
    for (std::size_t i = 0; i < tile.places.size(); ++i) {
      const std::size_t row = tile.places[i] % kTileRows, col = tile.places[i] / kTileRows;
      const std::size_t at = row * tile.cols + col;
      const float wanted = tile.weights[at] + 0.5F * tile.values[i];
      if (std::abs(tile.remainders[i]) == 127) continue;  // clipped by packing already
      if (std::abs(after[at] - wanted) > 0.51F * step(row, col)) ++beyond;
    }
    CHECK(beyond <= counts.clamped);
    for (std::size_t at = 0; at < before.size(); ++at) {
      const auto place = static_cast<std::uint32_t>(at % tile.cols * kTileRows + at / tile.cols);
      if (!std::binary_search(tile.places.begin(), tile.places.end(), place)) CHECK(after[at] == before[at]);
    }
  }
}

TEST_CASE("deltas that meet are summed and rounded once") {
  Random random(7);
  Tile tile("int4", 256, 3, 0.1F, random);
  const std::vector<std::byte> before = tile.packed;
  Tile sum = tile;
  for (float& value : sum.values) value = 0.75F * value + -0.5F * value;
  PatchCounts counts;
  std::vector<PatchEntry> entries(2 * patch_room(tile.as, tile.cols).entries(1, tile.places.size()));
  const TileDelta both[] = {tile.delta(0.75F), tile.delta(-0.5F)};
  compile_patch(tile.as, tile.cols, both, tile.packed.data(), entries.data(), counts);
  const TileDelta one = sum.delta();
  compile_patch(sum.as, sum.cols, std::span(&one, 1), sum.packed.data(), entries.data(), counts);
  CHECK(tile.packed == sum.packed);
}

TEST_CASE("clamped and unchanged codes are counted, and fidelity says what became of the deltas") {
  Random random(8);
  Tile tile("int4", 256, 4, 0, random);
  std::vector<PatchEntry> entries(patch_room(tile.as, tile.cols).entries(1, tile.places.size()));
  const auto counts_of = [&](float value) {
    std::fill(tile.values.begin(), tile.values.end(), value);
    std::vector<std::byte> bytes = tile.packed;
    PatchCounts counts;
    const TileDelta delta = tile.delta();
    compile_patch(tile.as, tile.cols, std::span(&delta, 1), bytes.data(), entries.data(), counts);
    return counts;
  };
  const PatchCounts huge = counts_of(1e6F);
  CHECK(huge.clamped == tile.places.size());
  CHECK(huge.fidelity() > 0.99);
  const PatchCounts tiny = counts_of(1e-6F);
  CHECK(tiny.clamped < tile.places.size() / 10);
  CHECK(tiny.unchanged > tile.places.size() * 9 / 10);
  const PatchCounts fair = counts_of(0.5F);
  CHECK(fair.fidelity() < 0.4);
  CHECK(PatchCounts{}.fidelity() == 0);
}

TEST_CASE("remainders found from the floats are those that packing gives") {
  Random random(9);
  for (const char* name : kPatched) {
    CAPTURE(name);
    const Tile tile(name, 128, 1, 1, random);
    std::vector<float> floats;
    for (const std::uint32_t place : tile.places)
      floats.push_back(tile.weights[place % kTileRows * tile.cols + place / kTileRows]);
    std::vector<std::int8_t> found(floats.size());
    tile_remainders(tile.as, tile.cols, tile.packed.data(), tile.places, floats, found);
    for (std::size_t i = 0; i < found.size(); ++i)
      CHECK(std::abs(found[i] - std::clamp<int>(tile.remainders[i], -100, 100)) <= 1);
  }
}

TEST_CASE("codes of codebooks and floats take no patches") {
  for (const Format& as : formats()) {
    const bool codebook = as.codebook != Codebook::none;
    CHECK(takes_patches(as) == (!as.is_float() && !codebook));
  }
}
