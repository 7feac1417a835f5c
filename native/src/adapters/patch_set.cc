#include "adapters/patch_set.h"

#include <algorithm>

namespace edgert {

PatchSet::PatchSet(const Targets& targets, const AdapterMix& mix)
    : mix_(mix.entries), index_(static_cast<std::size_t>(targets.count()), -1) {
  std::sort(mix_.begin(), mix_.end(), [](const AdapterMix::Entry& a, const AdapterMix::Entry& b) {
    return a.adapter->order() < b.adapter->order();
  });
}

void PatchSet::cover(int target, FormatId format, Targets::Shape shape) {
  index_[static_cast<std::size_t>(target)] = static_cast<std::int32_t>(matrices_.size());
  matrices_.push_back({format, shape.rows, shape.cols});
}

void PatchSet::charge(std::shared_ptr<Budget> budget, std::size_t bytes) {
  lists_bytes_ = matrices_.capacity() * sizeof(Matrix) + index_.size() * sizeof(std::int32_t);
  lists_ = std::make_unique<Charge>(budget, lists_bytes_, "patches");
  memory_ = Buffer(std::move(budget), std::max<std::size_t>(1, bytes), "patches of adapters");
}

bool PatchSet::is_of(const std::vector<AdapterMix::Entry>& entries) const noexcept {
  const auto has = [&](const AdapterMix::Entry& entry) {
    return std::any_of(mix_.begin(), mix_.end(), [&](const AdapterMix::Entry& own) {
      return own.adapter == entry.adapter && own.scale == entry.scale;
    });
  };
  return entries.size() == mix_.size() && std::all_of(entries.begin(), entries.end(), has);
}

std::unique_lock<std::mutex> PatchSet::bring(std::span<const int>) { return {}; }
bool PatchSet::keeps_all() const noexcept { return true; }
void PatchSet::make(const Matrix&, int, std::size_t, std::byte*) noexcept {}

void PatchSet::apply(int target, std::size_t tile, std::byte* codes, bool ask_ahead) noexcept {
  const Matrix& m = matrix(target);
  const std::size_t bytes = tile_bytes(format(m.format), m.cols);
  std::byte* const of_tile = codes + tile * bytes;
  if (!m.there) return make(m, target, tile, of_tile);
  const PatchTile& of = m.tiles[tile];
  const bool more = ask_ahead && (tile + 1) * kTileRows < m.rows;
  apply_patch({m.entries + of.first, of.count}, of_tile, {of_tile + bytes, more ? bytes : 0});
}

void PatchSet::count(const PatchCounts& more) {
  const std::lock_guard lock(mutex_);
  counts_.add(more);
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
  if (on != nullptr) on->finished(target);
  done = true;
}

}  // namespace edgert
