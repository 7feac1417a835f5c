#include "adapters/compiled_patches.h"

#include <algorithm>

namespace edgert {
namespace {

std::size_t tiles_of(std::size_t rows) { return (rows + kTileRows - 1) / kTileRows; }

}  // namespace

CompiledPatches::CompiledPatches(const Targets& targets, const FormatOf& format_of, const AdapterMix& mix,
                                 std::shared_ptr<Budget> budget)
    : PatchSet(targets, mix) {
  std::size_t tiles = 0;
  std::vector<std::size_t> rooms;  // of entries, by matrix
  for (int target = 0; target < targets.count(); ++target) {
    std::size_t codes = 0, together = 0;
    bool known = true;
    const Targets::Shape shape = targets.shape(target);
    const std::size_t own_tiles = tiles_of(shape.rows);
    for (const AdapterMix::Entry& entry : mix_) {
      const Adapter::Part* part = entry.adapter->part(target);
      if (part == nullptr || part->first == nullptr) continue;
      codes += part->first[own_tiles];
      ++together;
      known = known && part->remainders != nullptr && part->rows == shape.rows;
    }
    if (together == 0) continue;
    const std::optional<FormatId> as = format_of(target);
    const bool can = known && together <= kMostTogether && as && takes_patches(format(*as));
    const std::size_t room = can ? patch_room(format(*as), shape.cols).entries(own_tiles, codes) : 0;
    if (!can || room > UINT32_MAX) {
      leave();
      continue;
    }
    cover(target, *as, shape);
    tiles += own_tiles;
    rooms.push_back(room);
  }
  std::size_t entries = 0;
  for (const std::size_t room : rooms) entries += room;
  charge(std::move(budget), tiles * sizeof(PatchTile) + entries * sizeof(PatchEntry));
  auto* tile = memory_.as<PatchTile>();
  auto* entry = reinterpret_cast<PatchEntry*>(tile + tiles);
  for (std::size_t i = 0; i < matrices_.size(); ++i) {
    matrices_[i].tiles = tile;
    matrices_[i].entries = entry;
    tile += tiles_of(matrices_[i].rows);
    entry += rooms[i];
  }
}

void CompiledPatches::make(const Matrix& m, int target, std::size_t tile, std::byte* of_tile) noexcept {
  TileDelta deltas[kMostTogether];
  std::size_t together = 0, before = 0;
  for (const AdapterMix::Entry& entry : mix_) {
    const Adapter::Part* part = entry.adapter->part(target);
    if (part == nullptr || part->first == nullptr) continue;
    const std::uint32_t first = part->first[tile], values = part->first[tile + 1] - first;
    before += first;
    deltas[together++] = {
        {part->places + first, values}, part->values + first, part->remainders + first, entry.scale};
  }
  const Format& as = format(m.format);
  PatchCounts counts;
  const std::size_t first = patch_room(as, m.cols).entries(tile, before);
  const std::size_t used = compile_patch(as, m.cols, {deltas, together}, of_tile, m.entries + first, counts);
  m.tiles[tile] = {static_cast<std::uint32_t>(first), static_cast<std::uint32_t>(used)};
  count(counts);
}

}  // namespace edgert
