#include "adapters/overlay.h"

#include <algorithm>
#include <bit>

#include "adapters/patch_set.h"
#include "bundle/xxhash.h"

namespace edgert {
namespace {

constexpr std::size_t kTile = kTileRows;

std::size_t tiles(std::size_t rows) { return (rows + kTile - 1) / kTile; }

// Rows [begin, end) of a tile.
struct TileRows {
  TileRows(std::size_t tile, std::size_t rows) : begin(tile * kTile), end(std::min(rows, begin + kTile)) {}
  std::size_t begin, end;
};

}  // namespace

std::size_t AdapterMix::rank() const noexcept {
  std::size_t sum = 0;
  for (const Entry& entry : entries) sum += entry.adapter->max_rank();
  return sum;
}

std::uint64_t AdapterMix::fingerprint() const {
  std::vector<const Entry*> order;
  for (const Entry& entry : entries) {
    if (entry.scale != 0) order.push_back(&entry);
  }
  if (order.empty()) return 0;
  std::sort(order.begin(), order.end(),
            [](const Entry* a, const Entry* b) { return a->adapter->order() < b->adapter->order(); });
  Xxh64 hash;
  if (patch != nullptr) {
    const std::uint64_t patched[] = {patch->covered(), patch->left()};
    hash.update(std::as_bytes(std::span(patched)));
  }
  for (const Entry* entry : order) {
    const std::uint64_t one[] = {entry->adapter->fingerprint(), std::bit_cast<std::uint32_t>(entry->scale)};
    hash.update(std::as_bytes(std::span(one)));
  }
  return hash.digest();
}

Overlay::Overlay(std::shared_ptr<Budget> budget, std::size_t rows, int threads)
    : budget_(std::move(budget)), max_rows_(rows), threads_(threads) {}

void Overlay::reserve(const AdapterMix& mix) {
  const std::size_t adapters = std::max(adapters_, mix.entries.size());
  const std::size_t rank = std::max(rank_, mix.rank());
  if (adapters == adapters_ && rank == rank_) return;
  const std::size_t listed = max_rows_ * adapters;
  const std::size_t spaces = static_cast<std::size_t>(threads_) * max_rows_ * kTile;
  // Sequences that are there already need what there is: it goes once there is more.
  memory_ = Buffer(budget_, (3 * listed + max_rows_ * rank + spaces) * sizeof(float), "adapters' scratch");
  adapters_ = adapters;
  rank_ = rank;
  rows_ = memory_.as<std::int32_t>();
  inputs_ = rows_ + listed;
  scales_ = memory_.as<float>() + 2 * listed;
  inner_ = scales_ + listed;
  space_ = inner_ + max_rows_ * rank;
}

void Overlay::begin(std::span<const AdapterMix* const> rows) {
  active_.clear();
  patch_ = rows.empty() || rows[0] == nullptr ? nullptr : rows[0]->patch.get();
  for (std::size_t row = 0; row < rows.size(); ++row) {
    if (rows[row] == nullptr) continue;
    for (const AdapterMix::Entry& entry : rows[row]->entries) {
      const auto same = [&](const Active& active) { return active.adapter == entry.adapter.get(); };
      auto active = std::find_if(active_.begin(), active_.end(), same);
      if (active == active_.end())
        active = active_.insert(active_.end(), {entry.adapter.get(), std::vector<float>(rows.size())});
      active->scales[row] = entry.scale;
    }
  }
  std::sort(active_.begin(), active_.end(),
            [](const Active& a, const Active& b) { return a.adapter->order() < b.adapter->order(); });
}

bool Overlay::prepare(std::span<const Product> products) {
  if (active_.empty()) return false;
  tasks_.clear();
  units_.clear();
  all_.assign(products.begin(), products.end());
  used_rows_ = used_inner_ = 0;
  int tile = 0;
  for (const Product& product : products) {
    const std::size_t first = tasks_.size();
    for (const Active& active : active_) add_task(product, active);
    if (tasks_.size() == first) continue;
    tile += static_cast<int>(tiles(product.rows));
    units_.push_back({first, tasks_.size(), tile});
  }
  return !tasks_.empty();
}

void Overlay::add_task(const Product& product, const Active& active) {
  const Adapter::Part* part = active.adapter->part(product.target);
  if (part == nullptr) return;
  const bool sparse = part->first != nullptr && (patch_ == nullptr || !patch_->covers(product.target));
  if (part->rank == 0 && part->gain == nullptr && !sparse) return;
  const std::size_t first = used_rows_;
  for (std::size_t i = 0; i < product.m; ++i) {
    const auto own = static_cast<std::int32_t>(i);
    const std::int32_t input = product.gather != nullptr ? product.gather[i] : own;
    const std::int32_t row = product.batch_rows != nullptr ? product.batch_rows[i] : input;
    const float scale = active.scales[static_cast<std::size_t>(row)];
    if (scale == 0) continue;
    rows_[used_rows_] = own;
    inputs_[used_rows_] = input;
    scales_[used_rows_++] = scale;
  }
  const std::size_t count = used_rows_ - first;
  if (count == 0) return;
  tasks_.push_back({&product, part, sparse, first, count, inner_ + used_inner_});
  if (part->rank == 0) return;
  MatMul& a = all_.emplace_back();
  a.format = part->format;
  a.weights = part->a;
  a.rows = part->rank;
  a.cols = part->cols;
  a.x = product.x;
  a.x_stride = product.x_stride;
  a.gather = inputs_ + first;
  a.m = count;
  a.y = inner_ + used_inner_;
  a.y_stride = part->rank;
  used_inner_ += count * part->rank;
}

void Overlay::add(ThreadPool& pool, const KernelTable& kernels) {
  pool.run(units_.back().end_tile, 0, [&](int begin, int end, int worker) {
    float* space = space_ + static_cast<std::size_t>(worker) * max_rows_ * kTile;
    int first_tile = 0;
    for (const Unit& unit : units_) {
      const std::span tasks(tasks_.data() + unit.first_task, unit.end_task - unit.first_task);
      for (int tile = std::max(begin, first_tile); tile < std::min(end, unit.end_tile); ++tile)
        add_tile(tasks, static_cast<std::size_t>(tile - first_tile), space, kernels);
      first_tile = unit.end_tile;
    }
  });
}

void Overlay::add_tile(std::span<const Task> tasks, std::size_t tile, float* space,
                       const KernelTable& kernels) const {
  for (const Task& task : tasks) gain(task, tile);
  for (const Task& task : tasks) {
    low_rank(task, tile, space, kernels);
    sparse(task, tile);
  }
}

void Overlay::gain(const Task& task, std::size_t tile) const {
  if (task.part->gain == nullptr) return;
  const Product& p = *task.product;
  const float* bias = task.part->gain_spares_bias ? p.bias : nullptr;
  const TileRows rows(tile, p.rows);
  for (std::size_t i = task.first; i < task.first + task.count; ++i) {
    float* y = p.y + static_cast<std::size_t>(rows_[i]) * p.y_stride;
    for (std::size_t r = rows.begin; r < rows.end; ++r)
      y[r] += scales_[i] * task.part->gain[r] * (bias == nullptr ? y[r] : y[r] - bias[r]);
  }
}

void Overlay::low_rank(const Task& task, std::size_t tile, float* space, const KernelTable& kernels) const {
  const Adapter::Part& part = *task.part;
  if (part.rank == 0) return;
  const Product& p = *task.product;
  const TileRows rows(tile, p.rows);
  MatMul b;
  b.format = part.format;
  b.weights = part.b + tile * tile_bytes(format(part.format), part.rank);
  b.rows = rows.end - rows.begin;
  b.cols = part.rank;
  b.x = task.inner;
  b.x_stride = part.rank;
  b.m = task.count;
  b.y = space;
  b.y_stride = kTile;
  kernels.matmul(b, 0, 1);
  for (std::size_t n = 0; n < task.count; ++n) {
    const std::size_t i = task.first + n;
    float* y = p.y + static_cast<std::size_t>(rows_[i]) * p.y_stride + rows.begin;
    for (std::size_t r = 0; r < b.rows; ++r) y[r] += scales_[i] * space[n * kTile + r];
  }
}

void Overlay::sparse(const Task& task, std::size_t tile) const {
  const Adapter::Part& part = *task.part;
  if (!task.sparse) return;
  const Product& p = *task.product;
  const TileRows rows(tile, p.rows);
  for (std::size_t i = task.first; i < task.first + task.count; ++i) {
    const float* x = p.x + static_cast<std::size_t>(inputs_[i]) * p.x_stride;
    float* y = p.y + static_cast<std::size_t>(rows_[i]) * p.y_stride;
    float sums[kTile] = {};  // each of its row's values in the order of their columns
    for (std::uint32_t n = part.first[tile]; n < part.first[tile + 1]; ++n)
      sums[part.places[n] % kTile] += part.values[n] * x[part.places[n] / kTile];
    for (std::size_t r = rows.begin; r < rows.end; ++r) y[r] += scales_[i] * sums[r - rows.begin];
  }
}

}  // namespace edgert
