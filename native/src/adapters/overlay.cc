#include "adapters/overlay.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "adapters/gating.h"
#include "adapters/patch_set.h"
#include "bundle/xxhash.h"

namespace edgert {
namespace {

constexpr std::size_t kTile = kTileRows;
constexpr std::size_t kBlock = 8 * kTile;  // output rows that a kernel is asked for together
constexpr std::size_t kRows = 32;          // and activation rows
constexpr std::size_t kSpace = kRows * kBlock;
constexpr std::size_t kInline = 1 << 15;  // multiply-adds that are not worth waking threads for

std::size_t tiles(std::size_t rows) { return (rows + kTile - 1) / kTile; }

// Rows behind the product's own have none.
float bias_of(const Product& product, std::size_t row) {
  return product.bias == nullptr || row >= product.rows ? 0 : product.bias[row];
}

}  // namespace

std::size_t AdapterMix::rank() const noexcept {
  std::size_t sum = 0;
  for (const Entry& entry : entries) sum += entry.adapter->max_rank();
  return sum;
}

void AdapterMix::replace_row(int target, std::int32_t row, std::span<float> out,
                             std::span<float> space) const {
  for (const auto& [adapter, scale] : entries) {
    if (const Adapter::Part* part = adapter->part(target)) part->replace_row(row, scale, out, space);
  }
}

bool AdapterMix::shift(int target, std::span<const float> from, std::span<float> to) const {
  bool any = false;
  for (const auto& [adapter, scale] : entries) {
    const Adapter::Part* part = adapter->part(target);
    if (part == nullptr || part->shift == nullptr || scale == 0) continue;
    if (!std::exchange(any, true)) std::copy(from.begin(), from.end(), to.begin());
    for (std::size_t i = 0; i < to.size(); ++i) to[i] += scale * part->shift[i];
  }
  return any;
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
  if (top_k != 0) hash.update(std::as_bytes(std::span(&top_k, 1)));
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

void Overlay::reserve(const std::shared_ptr<const AdapterMix>& mix) {
  std::erase_if(reserved_, [](const auto& one) { return one.expired(); });
  const std::size_t adapters = std::max(adapters_, mix->entries.size());
  const std::size_t rank = std::max(rank_, mix->rank());
  if (adapters != adapters_ || rank != rank_) {
    const std::size_t listed = 2 * max_rows_ * adapters;  // of all products of a step, and of one multiply()
    const std::size_t spaces = static_cast<std::size_t>(threads_) * kSpace;
    // Sequences that are there already need what there is: it goes once there is more.
    const std::size_t shares = max_rows_ * adapters;
    const std::size_t numbers = 3 * listed + shares + max_rows_ * rank + spaces;
    memory_ = Buffer(budget_, numbers * sizeof(float), "adapters' scratch");
    adapters_ = adapters;
    rank_ = rank;
    rows_ = memory_.as<std::int32_t>();
    inputs_ = rows_ + listed;
    scales_ = memory_.as<float>() + 2 * listed;
    shares_ = scales_ + listed;
    inner_ = shares_ + shares;
    space_ = inner_ + max_rows_ * rank;
  }
  reserved_.push_back(mix);
}

bool Overlay::trim() {
  std::erase_if(reserved_, [](const auto& one) { return one.expired(); });
  if (!reserved_.empty()) return false;
  memory_ = Buffer();
  adapters_ = rank_ = 0;
  return true;
}

void Overlay::begin(std::span<const AdapterMix* const> rows) {
  active_.clear();
  top_k_.clear();
  patch_ = rows.empty() || rows[0] == nullptr ? nullptr : rows[0]->patch.get();
  for (std::size_t row = 0; row < rows.size(); ++row) {
    if (rows[row] == nullptr) continue;
    if (rows[row]->top_k != 0) {
      top_k_.resize(rows.size());
      top_k_[row] = rows[row]->top_k;
    }
    for (const AdapterMix::Entry& entry : rows[row]->entries) {
      const auto same = [&](const Active& active) { return active.adapter == entry.adapter.get(); };
      auto active = std::find_if(active_.begin(), active_.end(), same);
      if (active == active_.end()) {
        active = active_.insert(active_.end(), Active{});
        active->adapter = entry.adapter.get();
        active->scales.resize(rows.size());
      }
      active->scales[row] = entry.scale;
    }
  }
  std::sort(active_.begin(), active_.end(),
            [](const Active& a, const Active& b) { return a.adapter->order() < b.adapter->order(); });
  used_rows_ = 0;
  Product every;
  every.m = rows.size();
  for (Active& active : active_) active.own = rows_of(every, active);
  own_rows_ = used_rows_;
}

bool Overlay::prepare(std::span<const Product> products) {
  if (active_.empty()) return false;
  tasks_.clear();
  units_.clear();
  used_rows_ = own_rows_;
  used_inner_ = work_ = 0;
  all_.clear();
  int tile = 0;
  for (const Product& product : products) {
    const std::size_t first = tasks_.size();
    if (!top_k_.empty()) find_shares(product);
    for (const Active& active : active_) add_task(product, active);
    if (tasks_.size() == first) continue;
    std::size_t rows = product.rows;
    for (std::size_t i = first; i < tasks_.size(); ++i) rows = std::max(rows, tasks_[i].part->rows);
    tile += static_cast<int>(tiles(rows));
    units_.push_back({first, tasks_.size(), rows, tile});
  }
  if (tasks_.empty()) return false;
  all_.insert(all_.begin(), products.begin(), products.end());
  return true;
}

Overlay::Place Overlay::place(const Product& product, std::size_t i) noexcept {
  const std::int32_t input = product.gather != nullptr ? product.gather[i] : static_cast<std::int32_t>(i);
  return {input, product.batch_rows != nullptr ? product.batch_rows[i] : input};
}

Overlay::Rows Overlay::rows_of(const Product& product, const Active& active) {
  const std::size_t first = used_rows_;
  const float* share = active.shares;
  for (std::size_t i = 0; i < product.m; ++i) {
    const auto [input, row] = place(product, i);
    float scale = active.scales[static_cast<std::size_t>(row)];
    if (scale == 0) continue;
    if (share != nullptr) scale *= *share++;
    if (scale == 0) continue;
    rows_[used_rows_] = static_cast<std::int32_t>(i);
    inputs_[used_rows_] = input;
    scales_[used_rows_++] = scale;
  }
  return {rows_ + first, inputs_ + first, scales_ + first, used_rows_ - first};
}

// 1 where the row's mix is not gated.
void Overlay::find_shares(const Product& product) {
  scores_.resize(active_.size());
  next_shares_.clear();
  float* room = shares_;  // of a row for as many adapters as its mix has
  for (Active& active : active_) {
    next_shares_.push_back(active.shares = room);
    for (std::size_t i = 0; i < product.m; ++i)
      room += active.scales[static_cast<std::size_t>(place(product, i).row)] != 0 ? 1 : 0;
  }
  for (std::size_t i = 0; i < product.m; ++i) {
    const auto [input, row] = place(product, i);
    const std::size_t top_k = top_k_[static_cast<std::size_t>(row)];
    std::fill(scores_.begin(), scores_.end(), 1.0F);
    if (top_k != 0) {
      const std::span x(product.x + static_cast<std::size_t>(input) * product.x_stride, product.cols);
      const Standard standard(x);
      for (std::size_t n = 0; n < active_.size(); ++n) {
        const Adapter::Part* part = active_[n].adapter->part(product.target);
        const bool there = part != nullptr && active_[n].scales[static_cast<std::size_t>(row)] != 0;
        scores_[n] = there ? static_cast<float>(suits(part->gate, x, standard)) : kNoScore;
      }
      share(scores_, top_k);
    }
    for (std::size_t n = 0; n < active_.size(); ++n) {
      if (active_[n].scales[static_cast<std::size_t>(row)] != 0) *next_shares_[n]++ = scores_[n];
    }
  }
}

void Overlay::add_task(const Product& product, const Active& active) {
  const Adapter::Part* part = active.adapter->part(product.target);
  if (part == nullptr) return;
  const bool sparse = part->first != nullptr && (patch_ == nullptr || !patch_->covers(product.target));
  if (part->rank == 0 && part->gain == nullptr && part->shift == nullptr && part->weights == nullptr &&
      !sparse)
    return;
  const bool every = product.gather == nullptr && product.batch_rows == nullptr && top_k_.empty();
  Task task;
  static_cast<Rows&>(task) = every ? active.own : rows_of(product, active);
  if (task.count == 0) return;
  task.product = &product;
  task.part = part;
  task.sparse = sparse;
  task.inner = inner_ + used_inner_;
  tasks_.push_back(task);
  work_ += task.count * (part->rows * (1 + part->rank) + part->weight_count * part->cols +
                         (sparse ? part->first[tiles(part->rows)] : 0));
  if (part->rank == 0) return;
  Product& a = all_.emplace_back();
  a.format = part->format;
  a.weights = part->a;
  a.rows = part->rank;
  a.cols = part->cols;
  a.x = product.x;
  a.x_stride = product.x_stride;
  a.gather = task.inputs;
  a.m = task.count;
  a.y = inner_ + used_inner_;
  a.y_stride = part->rank;
  used_inner_ += task.count * part->rank;
}

void Overlay::add(ThreadPool& pool, const KernelTable& kernels) {
  const auto range = [&](int begin, int end, int worker) {
    float* space = space_ + static_cast<std::size_t>(worker) * kSpace;
    int first_tile = 0;
    for (const Unit& unit : units_) {
      const std::span tasks(tasks_.data() + unit.first_task, unit.end_task - unit.first_task);
      const int from = std::max(begin, first_tile) - first_tile;
      const int to = std::min(end, unit.end_tile) - first_tile;
      const std::size_t stop = std::min(unit.rows, static_cast<std::size_t>(std::max(to, 0)) * kTile);
      for (std::size_t row = static_cast<std::size_t>(from) * kTile; row < stop; row += kBlock)
        add_block(tasks, {row, std::min(stop, row + kBlock)}, space, kernels);
      first_tile = unit.end_tile;
    }
  };
  if (work_ <= kInline) {
    range(0, units_.back().end_tile, 0);
  } else {
    pool.run(units_.back().end_tile, 0, range);
  }
}

void Overlay::add_block(std::span<const Task> tasks, Block block, float* space,
                        const KernelTable& kernels) const {
  const auto each = [&](const auto& work) {
    for (const Task& task : tasks) {
      const Block own{block.begin, std::min(block.end, task.part->rows)};
      if (own.begin < own.end) work(task, own);
    }
  };
  each([&](const Task& task, Block own) { replace(task, own, space, kernels); });
  each([&](const Task& task, Block own) { gain(task, own); });
  each([&](const Task& task, Block own) {
    low_rank(task, own, space, kernels);
    sparse(task, own);
    shift(task, own);
  });
}

// y += scale * (W' x + bias - y), of the rows that there are
void Overlay::replace(const Task& task, Block block, float* space, const KernelTable& kernels) const {
  const Adapter::Part& part = *task.part;
  if (part.weights == nullptr) return;
  const Product& p = *task.product;
  std::size_t at = block.begin;  // in the weights, as is `end`
  std::size_t end = block.end;
  if (part.weight_rows != nullptr) {
    const auto place = [&](std::size_t row) {
      return static_cast<std::size_t>(std::lower_bound(part.weight_rows, part.weight_rows + part.weight_count,
                                                       static_cast<std::int32_t>(row)) -
                                      part.weight_rows);
    };
    at = place(block.begin);
    end = place(block.end);
  }
  MatMul w;
  w.format = part.format;
  w.cols = p.cols;
  w.x = p.x;
  w.x_stride = p.x_stride;
  w.y = space;
  w.y_stride = kTile;
  while (at < end) {
    const std::size_t tile = at / kTile;
    const std::size_t stop = std::min(end, (tile + 1) * kTile);
    w.weights = part.weights + tile * tile_bytes(format(part.format), p.cols);
    w.rows = std::min(kTile, part.weight_count - tile * kTile);
    for (std::size_t first = 0; first < task.count; first += kRows) {
      w.gather = task.inputs + first;
      w.m = std::min(kRows, task.count - first);
      kernels.matmul(w, 0, 1);
      for (std::size_t n = 0; n < w.m; ++n) {
        float* y = p.y + static_cast<std::size_t>(task.rows[first + n]) * p.y_stride;
        for (std::size_t i = at; i < stop; ++i) {
          const std::size_t r =
              part.weight_rows == nullptr ? i : static_cast<std::size_t>(part.weight_rows[i]);
          const float own = space[n * kTile + i % kTile] + bias_of(p, r);
          y[r] += part.scale_of(r, task.scales[first + n]) * (own - y[r]);
        }
      }
    }
    at = stop;
  }
}

void Overlay::gain(const Task& task, Block block) const {
  if (task.part->gain == nullptr) return;
  const Product& p = *task.product;
  const bool spares_bias = task.part->gain_spares_bias;
  for (std::size_t i = 0; i < task.count; ++i) {
    float* y = p.y + static_cast<std::size_t>(task.rows[i]) * p.y_stride;
    for (std::size_t r = block.begin; r < block.end; ++r)
      y[r] += task.scales[i] * task.part->gain[r] * (spares_bias ? y[r] - bias_of(p, r) : y[r]);
  }
}

void Overlay::low_rank(const Task& task, Block block, float* space, const KernelTable& kernels) const {
  const Adapter::Part& part = *task.part;
  if (part.rank == 0) return;
  const Product& p = *task.product;
  MatMul b;
  b.format = part.format;
  b.weights = part.b + block.begin / kTile * tile_bytes(format(part.format), part.rank);
  b.rows = block.end - block.begin;
  b.cols = part.rank;
  b.x_stride = part.rank;
  b.y = space;
  b.y_stride = kBlock;
  for (std::size_t first = 0; first < task.count; first += kRows) {
    b.x = task.inner + first * part.rank;
    b.m = std::min(kRows, task.count - first);
    kernels.matmul(b, 0, tiles(b.rows));
    for (std::size_t n = 0; n < b.m; ++n) {
      const float scale = task.scales[first + n] * part.factor_scale;
      const float* add = space + n * kBlock;
      float* y = p.y + static_cast<std::size_t>(task.rows[first + n]) * p.y_stride + block.begin;
      for (std::size_t r = 0; r < b.rows; ++r) y[r] += scale * add[r];
    }
  }
}

void Overlay::sparse(const Task& task, Block block) const {
  const Adapter::Part& part = *task.part;
  if (!task.sparse) return;
  const Product& p = *task.product;
  for (std::size_t i = 0; i < task.count; ++i) {
    const float* x = p.x + static_cast<std::size_t>(task.inputs[i]) * p.x_stride;
    float* y = p.y + static_cast<std::size_t>(task.rows[i]) * p.y_stride;
    for (std::size_t row = block.begin; row < block.end; row += kTile) {
      const std::size_t tile = row / kTile;
      float sums[kTile] = {};  // each of its row's values in the order of their columns
      for (std::uint32_t n = part.first[tile]; n < part.first[tile + 1]; ++n)
        sums[part.places[n] % kTile] += part.values[n] * x[part.places[n] / kTile];
      for (std::size_t r = row; r < std::min(block.end, row + kTile); ++r)
        y[r] += task.scales[i] * sums[r - row];
    }
  }
}

void Overlay::shift(const Task& task, Block block) const {
  if (task.part->shift == nullptr) return;
  const Product& p = *task.product;
  for (std::size_t i = 0; i < task.count; ++i) {
    float* y = p.y + static_cast<std::size_t>(task.rows[i]) * p.y_stride;
    for (std::size_t r = block.begin; r < block.end; ++r) y[r] += task.scales[i] * task.part->shift[r];
  }
}

}  // namespace edgert
