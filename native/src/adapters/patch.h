// Sparse deltas as patches of packed codes, tile by tile: which codes change, and in which bits.
//
//   code' = code + remainder + delta / scale, rounded to nearest and clamped to the format's codes
//
// where the remainder is what the code lacks of the weight that it was made of. Without it every delta below
// half a step would be lost; with it the patched weights are what quantising the changed floats would give.
// Deltas that meet are summed, then rounded once. What is kept is code XOR code', so that applying a patch
// twice gives the bytes back.
//
// Scales and zeros stay as they are, and nothing that is derived from codes exists.
//
// Threads: functions without state.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "quant/format.h"

namespace edgert {

// A byte of the tile is changed by `bits`, `step` - kBack bytes after the one before it: one pass from its
// beginning to its end, but to and fro within the 64 bytes of a vector, so that nothing needs to be sorted.
// Longer ways take several entries, all but the last without bits.
struct PatchEntry {
  static constexpr int kBack = 63;
  std::uint8_t step = kBack;
  std::uint8_t bits = 0;
};
// Of a tile: so many of a matrix' entries, from one of them on.
struct PatchTile {
  std::uint32_t first = 0;
  std::uint32_t count = 0;
};
inline constexpr std::size_t kMostPatchCols = std::size_t{1} << 27;  // places have 32 bits
inline constexpr std::size_t kMostTogether = 64;                     // deltas of a tile

// The most entries that patches take: so many a tile, and so many a code that they change.
struct PatchRoom {
  std::size_t of_tile;
  std::size_t of_code;
  std::size_t entries(std::size_t tiles, std::size_t codes) const noexcept {
    return tiles * of_tile + codes * of_code;
  }
};
PatchRoom patch_room(const Format& format, std::size_t cols);

// What became of deltas.
struct PatchCounts {
  std::uint64_t values = 0;
  std::uint64_t unchanged = 0;  // the code that is nearest is the one that is there
  std::uint64_t clamped = 0;    // the nearest code is beyond those that the format has
  double intended = 0;          // sum of squares of the deltas
  double error = 0;             // of what became of each less itself
  double apart = 0;             // of the patched weights less the changed floats
  double beside = 0;            // of the weights with the deltas beside them less the changed floats
  void add(const PatchCounts& other) noexcept;
  // || realised - intended || / || intended ||; 0 where nothing was intended. Of small deltas most of it is
  // rounding, of which the weights have as much without a patch.
  double fidelity() const noexcept;
  // How much further patched weights are from the changed floats than deltas beside the weights leave them,
  // as a share of what those floats and the weights differ by: what clamping costs.
  double loss() const noexcept;
};

// A delta of one tile, its places ascending; they are those of Adapter::Part: kTileRows * column + row.
struct TileDelta {
  std::span<const std::uint32_t> places;
  const float* values = nullptr;
  const std::int8_t* remainders = nullptr;  // null: none
  float scale = 1;
};

// Whether the format's codes are evenly spaced, so that a delta is a number of steps.
bool takes_patches(const Format& format) noexcept;

// Changes the tile's codes and writes the patch to `entries`, which have room for the most that it takes;
// returns how many it took. REQUIRES a format that takes patches, places inside the tile, and at most
// kMostTogether deltas.
std::size_t compile_patch(const Format& format, std::size_t cols, std::span<const TileDelta> deltas,
                          std::byte* tile, PatchEntry* entries, PatchCounts& counts) noexcept;

// Puts a patch on, or takes it off again. Of `ahead`, what will be changed next, a line is asked for with
// every entry: a patch of 1% has about one a line, and waits for memory otherwise.
void apply_patch(std::span<const PatchEntry> entries, std::byte* tile,
                 std::span<const std::byte> ahead = {}) noexcept;

// remainders[i] = (floats[i] - weight at places[i]) / scale in steps of 1/200, at most half a code: where the
// code is further away, it was chosen so to make up for others' errors, and stays.
void tile_remainders(const Format& format, std::size_t cols, const std::byte* tile,
                     std::span<const std::uint32_t> places, std::span<const float> floats,
                     std::span<std::int8_t> remainders) noexcept;

}  // namespace edgert
