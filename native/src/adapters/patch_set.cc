#include "adapters/patch_set.h"

#include <algorithm>

namespace edgert {
namespace {

std::size_t at(int index) { return static_cast<std::size_t>(index); }

}  // namespace

PatchSet::PatchSet(const Targets& targets, const FormatOf& format_of, const AdapterMix& mix,
                   std::shared_ptr<Budget> budget)
    : mix_(mix.entries), index_(at(targets.count()), -1) {
  std::sort(mix_.begin(), mix_.end(), [](const AdapterMix::Entry& a, const AdapterMix::Entry& b) {
    return a.adapter->order() < b.adapter->order();
  });
  std::size_t tiles = 0, entries = 0;
  for (int target = 0; target < targets.count(); ++target) {
    std::size_t codes = 0, together = 0;
    bool known = true;
    const Targets::Shape shape = targets.shape(target);
    const std::size_t own_tiles = (shape.rows + kTileRows - 1) / kTileRows;
    for (const AdapterMix::Entry& entry : mix_) {
      const Adapter::Part* part = entry.adapter->part(target);
      if (part == nullptr || part->first == nullptr) continue;
      codes += part->first[own_tiles];
      ++together;
      known = known && part->remainders != nullptr;
    }
    if (together == 0) continue;
    const std::optional<FormatId> as = format_of(target);
    if (!known || together > kMostTogether || !as || !takes_patches(format(*as))) {
      ++left_;
      continue;
    }
    index_[at(target)] = static_cast<std::int32_t>(matrices_.size());
    matrices_.push_back({*as, false, shape.rows, shape.cols, tiles, entries});
    tiles += own_tiles;
    entries += patch_room(format(*as), shape.cols).entries(own_tiles, codes);
  }
  lists_bytes_ = matrices_.capacity() * sizeof(Matrix) + index_.size() * sizeof(std::int32_t);
  lists_ = std::make_unique<Charge>(budget, lists_bytes_, "patches");
  memory_ =
      Buffer(std::move(budget), std::max<std::size_t>(1, tiles * sizeof(Tile) + entries * sizeof(PatchEntry)),
             "patches of adapters");
  tiles_ = memory_.as<Tile>();
  entries_ = reinterpret_cast<PatchEntry*>(tiles_ + tiles);
}

bool PatchSet::is_of(const std::vector<AdapterMix::Entry>& entries) const noexcept {
  const auto has = [&](const AdapterMix::Entry& entry) {
    return std::any_of(mix_.begin(), mix_.end(), [&](const AdapterMix::Entry& own) {
      return own.adapter == entry.adapter && own.scale == entry.scale;
    });
  };
  return entries.size() == mix_.size() && std::all_of(entries.begin(), entries.end(), has);
}

void PatchSet::apply(int target, std::size_t tile, std::byte* codes, bool ask_ahead) noexcept {
  const Matrix& m = matrix(target);
  const std::size_t bytes = tile_bytes(format(m.format), m.cols);
  std::byte* const of_tile = codes + tile * bytes;
  if (!m.compiled) return compile(m, target, tile, of_tile);
  const Tile& of = tiles_[m.tile + tile];
  const bool more = ask_ahead && (tile + 1) * kTileRows < m.rows;
  apply_patch({entries_ + m.entry + of.first, of.count}, of_tile, {of_tile + bytes, more ? bytes : 0});
}

void PatchSet::compile(const Matrix& m, int target, std::size_t tile, std::byte* of_tile) noexcept {
  const Format& as = format(m.format);
  TileDelta deltas[kMostTogether];
  std::size_t together = 0, before = 0;
  for (const AdapterMix::Entry& entry : mix_) {
    const Adapter::Part* part = entry.adapter->part(target);
    if (part == nullptr || part->first == nullptr) continue;
    const std::uint32_t first = part->first[tile], count = part->first[tile + 1] - first;
    before += first;
    deltas[together++] = {
        {part->places + first, count}, part->values + first, part->remainders + first, entry.scale};
  }
  PatchCounts counts;
  Tile& of = tiles_[m.tile + tile];
  of.first = patch_room(as, m.cols).entries(tile, before);
  of.count = compile_patch(as, m.cols, {deltas, together}, of_tile, entries_ + m.entry + of.first, counts);
  const std::lock_guard lock(mutex_);
  counts_.add(counts);
}

PatchCounts PatchSet::counts() const {
  const std::lock_guard lock(mutex_);
  return counts_;
}

// Of each tile the one, then the other, while it is in the cache.
void Repatch::tiles(std::size_t begin, std::size_t end) const noexcept {
  for (std::size_t tile = begin; tile < end; ++tile) {
    if (off != nullptr) off->apply(target, tile, codes, true);
    if (on != nullptr) on->apply(target, tile, codes, off == nullptr);
  }
}

void Repatch::finish() noexcept {
  if (on != nullptr) on->compiled(target);
  done = true;
}

}  // namespace edgert
