#include "adapters/matrix_patch.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "adapters/patch_rounding.h"
#include "bundle/xxhash.h"
#include "platform/error.h"
#include "platform/memory.h"
#include "quant/pack.h"

namespace edgert {

void PatchCounts::add(const PatchCounts& other) noexcept {
  values += other.values;
  unchanged += other.unchanged;
  clamped += other.clamped;
  intended += other.intended;
  error += other.error;
  apart += other.apart;
  beside += other.beside;
}

double PatchCounts::fidelity() const noexcept { return intended == 0 ? 0 : std::sqrt(error / intended); }
double PatchCounts::loss() const noexcept {
  return apart <= beside ? 0 : std::sqrt((apart - beside) / (intended + beside));
}

bool takes_patches(const Format& format) noexcept {
  return !format.is_float() && format.codebook == Codebook::none;
}

void tile_remainders(const Format& format, std::size_t cols, const std::byte* tile,
                     std::span<const std::uint32_t> places, std::span<const float> floats,
                     std::span<std::int8_t> remainders) noexcept {
  constexpr float kMost = 0.5F / kRemainderStep;
  const Scales scales(format, cols, tile);
  with_codes(format, tile, cols, [&](const auto& codes) {
    for (std::size_t i = 0; i < places.size(); ++i) {
      const std::size_t col = places[i] / kTileRows, row = places[i] % kTileRows;
      const float scale = scales.at(col, row);
      const float lacks = scale == 0 ? 0 : (floats[i] - scales.weight(col, row, codes.get(col, row))) / scale;
      remainders[i] =
          static_cast<std::int8_t>(std::lrint(std::min(std::max(lacks / kRemainderStep, -kMost), kMost)));
    }
  });
}

namespace {

std::size_t tiles_of(std::size_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// An element of a delta, and where it lies.
struct Element {
  std::uint64_t tile;
  std::uint32_t place;  // in its tile: kTileRows * column + row
  std::uint32_t index;
  auto operator<=>(const Element&) const = default;
};

[[noreturn]] void fail(const MatrixDelta& delta, std::size_t i, const char* what) {
  throw Error(ErrorKind::invalid_argument, "value " + std::to_string(i) + " at [" +
                                               std::to_string(delta.rows[i]) + ", " +
                                               std::to_string(delta.cols[i]) + "] " + what);
}

// As packed codes lie.
std::vector<Element> in_order(const Format& format, std::span<const std::byte> packed, std::size_t rows,
                              std::size_t cols, const MatrixDelta& delta) {
  if (!takes_patches(format))
    throw Error(ErrorKind::unsupported,
                std::string(format.name) + " takes no patches: its codes are not evenly spaced");
  const std::size_t count = delta.rows.size();
  if (delta.cols.size() != count || delta.values.size() != count || count > UINT32_MAX ||
      (!delta.remainders.empty() && delta.remainders.size() != count) || cols > kMostPatchCols ||
      packed.size() != packed_bytes(format, rows, cols))
    throw Error(ErrorKind::invalid_argument,
                "a patch's rows, columns, values and matrix do not fit together");
  std::vector<Element> elements(count);
  for (std::size_t i = 0; i < count; ++i) {
    const auto row = static_cast<std::size_t>(delta.rows[i]), col = static_cast<std::size_t>(delta.cols[i]);
    if (delta.rows[i] < 0 || delta.cols[i] < 0 || row >= rows || col >= cols ||
        !std::isfinite(delta.values[i]))
      fail(delta, i, "is outside the matrix, or not finite");
    elements[i] = {row / kTileRows, static_cast<std::uint32_t>(col * kTileRows + row % kTileRows),
                   static_cast<std::uint32_t>(i)};
  }
  if (!std::is_sorted(elements.begin(), elements.end())) std::sort(elements.begin(), elements.end());
  for (std::size_t i = 1; i < count; ++i) {
    if (elements[i - 1].tile == elements[i].tile && elements[i - 1].place == elements[i].place)
      fail(delta, elements[i].index, "is there twice");
  }
  return elements;
}

}  // namespace

std::vector<std::int8_t> matrix_remainders(const Format& format, std::span<const std::byte> packed,
                                           std::size_t rows, std::size_t cols, const MatrixDelta& floats) {
  std::vector<std::int8_t> remainders(floats.values.size());
  const std::size_t bytes = tile_bytes(format, cols);
  for (const Element& at : in_order(format, packed, rows, cols, floats)) {
    tile_remainders(format, cols, packed.data() + at.tile * bytes, {&at.place, 1},
                    {&floats.values[at.index], 1}, {&remainders[at.index], 1});
  }
  return remainders;
}

std::vector<std::byte> matrix_patch(const Format& format, std::span<const std::byte> packed, std::size_t rows,
                                    std::size_t cols, const MatrixDelta& delta, PatchCounts& counts) {
  const std::vector<Element> elements = in_order(format, packed, rows, cols, delta);
  const std::size_t bytes = tile_bytes(format, cols);
  std::vector<PatchTile> tiles(tiles_of(rows));
  std::vector<PatchEntry> entries, of_tile;
  std::vector<std::byte> codes(bytes);
  std::vector<std::uint32_t> places;
  std::vector<float> values;
  std::vector<std::int8_t> remainders;
  auto at = elements.begin();
  for (std::size_t tile = 0; tile < tiles.size(); ++tile) {
    places.clear();
    values.clear();
    remainders.clear();
    for (; at != elements.end() && at->tile == tile; ++at) {
      places.push_back(at->place);
      values.push_back(delta.values[at->index]);
      remainders.push_back(delta.remainders.empty() ? std::int8_t{0} : delta.remainders[at->index]);
    }
    std::copy_n(packed.begin() + static_cast<std::ptrdiff_t>(tile * bytes), bytes, codes.begin());
    of_tile.resize(patch_room(format, cols).entries(1, places.size()));
    const TileDelta one{places, values.data(), remainders.data(), 1};
    const std::size_t used = compile_patch(format, cols, {&one, 1}, codes.data(), of_tile.data(), counts);
    if (entries.size() + used > UINT32_MAX)
      throw Error(ErrorKind::unsupported, "the matrix is too large for a patch");
    tiles[tile] = {static_cast<std::uint32_t>(entries.size()), static_cast<std::uint32_t>(used)};
    entries.insert(entries.end(), of_tile.begin(), of_tile.begin() + static_cast<std::ptrdiff_t>(used));
  }
  std::vector<std::byte> out(
      round_up(patch_header_bytes(rows) + entries.size() * sizeof(PatchEntry), sizeof(std::uint64_t)));
  std::memcpy(out.data() + sizeof(std::uint64_t), tiles.data(), tiles.size() * sizeof(PatchTile));
  if (!entries.empty())
    std::memcpy(out.data() + patch_header_bytes(rows), entries.data(), entries.size() * sizeof(PatchEntry));
  const std::uint64_t checksum = xxh64(std::span<const std::byte>(out).subspan(sizeof checksum));
  std::memcpy(out.data(), &checksum, sizeof checksum);
  return out;
}

std::size_t patch_header_bytes(std::size_t rows) noexcept {
  return sizeof(std::uint64_t) + tiles_of(rows) * sizeof(PatchTile);
}

void check_patch(const Format& format, std::size_t rows, std::size_t cols, std::span<const std::byte> bytes) {
  const auto fail = [](const char* what) { throw Error(ErrorKind::corrupt, what); };
  const std::size_t header = patch_header_bytes(rows);
  if (bytes.size() < header || bytes.size() % sizeof(std::uint64_t) != 0) fail("its size is no patch's");
  std::uint64_t checksum = 0;
  std::memcpy(&checksum, bytes.data(), sizeof checksum);
  if (xxh64(bytes.subspan(sizeof checksum)) != checksum) fail("checksum differs");
  const std::size_t there = (bytes.size() - header) / sizeof(PatchEntry);
  const auto* tiles = reinterpret_cast<const PatchTile*>(bytes.data() + sizeof checksum);
  const auto* entries = reinterpret_cast<const PatchEntry*>(bytes.data() + header);
  const std::size_t end = tile_parts(format, cols).scales;
  for (std::size_t tile = 0, first = 0; tile < tiles_of(rows); ++tile) {
    const PatchTile& of = tiles[tile];
    if (of.first != first || of.count > there - first) fail("its tiles are not those of the entries");
    first += of.count;
    std::size_t at = 0, outside = 0;  // wraps where an entry goes back too far, and is beyond the end then
    for (std::size_t i = of.first; i < first; ++i) {
      at += std::size_t{entries[i].step} - PatchEntry::kBack;
      outside |= at >= end ? 1 : 0;
    }
    if (outside != 0) fail("an entry is outside the matrix' codes");
  }
}

}  // namespace edgert
