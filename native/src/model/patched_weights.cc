#include "model/patched_weights.h"

#include <algorithm>
#include <utility>

#include "adapters/compiled_patches.h"
#include "bundle/xxhash.h"
#include "platform/error.h"

namespace edgert {
namespace {

std::size_t at(int index) { return static_cast<std::size_t>(index); }

// Of bytes that may be any, since reading them failed.
const ExpertStore::Change& unknown() {
  static const ExpertStore::Change change = std::make_shared<int>();
  return change;
}

// Null where they are the bundle's, or unknown.
PatchSet* set_of(const ExpertStore::Change& change) {
  return change == unknown() ? nullptr : static_cast<PatchSet*>(change.get());
}

// Whether it can be put on, or taken off, without reading anything twice.
bool stays(const ExpertStore::Change& change) {
  return change == nullptr || (change != unknown() && set_of(change)->keeps_all());
}

}  // namespace

PatchSet::FormatOf PatchedWeights::formats() const {
  std::vector<std::optional<FormatId>> formats(at(weights_.targets()->count()));
  for (int target = 0; target < weights_.dense_targets(); ++target) {
    if (weights_.codes(target) != nullptr) formats[at(target)] = weights_.format_of(target);
  }
  for (const auto& layer : bundle_.manifest().experts) {
    for (std::size_t e = 0; e < layer.experts.size(); ++e) {
      const ExpertFormats& f = bundle_.manifest().expert_formats[layer.experts[e].formats];
      const auto target = [&](ExpertPart part) {
        return at(weights_.targets()->expert(layer.layer, static_cast<int>(e), part));
      };
      formats[target(ExpertPart::gate)] = f.gate;
      formats[target(ExpertPart::up)] = f.up;
      formats[target(ExpertPart::down)] = f.down;
    }
  }
  return [formats = std::move(formats)](int target) { return formats[at(target)]; };
}

std::shared_ptr<PatchSet> PatchedWeights::make(const AdapterMix& mix, std::shared_ptr<Budget> budget) const {
  return std::make_shared<CompiledPatches>(*weights_.targets(), formats(), mix, std::move(budget));
}

std::shared_ptr<PatchSet> PatchedWeights::stored(const AdapterMix& mix, PatchFile file, bool keep,
                                                 std::shared_ptr<Budget> budget) const {
  file.bytes_read = bytes_read_;
  const int kept = keep ? weights_.targets()->count() : weights_.dense_targets();
  return std::make_shared<StoredPatches>(*weights_.targets(), formats(), mix, std::move(file), kept,
                                         std::move(budget));
}

void PatchedWeights::use(const std::shared_ptr<PatchSet>& set) {
  if (set == current_) return;
  std::vector<Repatch> work;
  std::vector<std::vector<int>> matrices;
  for (int target = 0; target < weights_.dense_targets(); ++target) {
    std::byte* const codes = weights_.codes(target);
    if (codes == nullptr) continue;
    add(work, current_.get(), set.get(), target, codes);
    matrices.push_back({target});
  }
  if (set != nullptr) bring(*set, matrices);
  change(work);
  const std::lock_guard lock(mutex_);
  current_ = set;
}

void PatchedWeights::remove(const std::shared_ptr<PatchSet>& set) {
  if (set == current_) use(nullptr);
  store_.visit([&](const ExpertStore::Expert& expert, ExpertStore::Lease& lease) {
    if (lease.change() == set) take_off(expert, lease);
  });
}

void PatchedWeights::put_on(const std::shared_ptr<PatchSet>& set, const ExpertStore::Expert& expert,
                            ExpertStore::Lease& lease) const {
  if (set == nullptr) return;
  flip(*set, expert, lease.bytes());
  lease.set_change(set);
}

void PatchedWeights::take_off(const ExpertStore::Expert& expert, ExpertStore::Lease& lease) const {
  if (lease.change() == nullptr) return;
  if (PatchSet* const set = set_of(lease.change())) {
    try {
      flip(*set, expert, lease.bytes());
      return lease.set_change(nullptr);
    } catch (const Error&) {
      lease.set_change(unknown());
    }
  }
  store_.reread(lease);
}

void PatchedWeights::flip(PatchSet& set, const ExpertStore::Expert& expert, std::byte* bytes) const {
  std::vector<Repatch> work;
  add_expert(work, nullptr, &set, expert, bytes);
  const auto held = set.bring(matrices_of(expert));
  change(work);
}

std::size_t PatchedWeights::check() {
  use(nullptr);
  std::size_t checked = weights_.check(bundle_);
  std::string damaged;
  store_.visit([&](const ExpertStore::Expert& expert, ExpertStore::Lease& lease) {
    take_off(expert, lease);
    const auto& layers = bundle_.manifest().experts;
    const auto row = std::find_if(layers.begin(), layers.end(),
                                  [&](const auto& layer) { return layer.layer == expert.layer; });
    const ExpertEntry& entry = row->experts[at(expert.expert)];
    if (entry.is_split()) return;
    ++checked;
    const bool same = xxh64(std::span(lease.data(), entry.extent.bytes)) == entry.extent.checksum;
    if (!same && damaged.empty()) {
      damaged = "expert " + std::to_string(expert.expert) + " of layer " + std::to_string(expert.layer) +
                ": its bytes in memory are not the bundle's";
    }
  });
  if (!damaged.empty()) throw Error(ErrorKind::corrupt, damaged);
  return checked;
}

PatchedWeights::Pending::Pending(const PatchedWeights& weights, int layer,
                                 std::span<ExpertStore::Lease* const> leases)
    : weights_(&weights) {
  PatchSet* const on = weights.current_.get();
  std::vector<std::vector<int>> matrices;
  for (ExpertStore::Lease* lease : leases) {
    const ExpertStore::Expert expert{layer, lease->expert(), lease->formats()};
    if (stays(weights.current_) && stays(lease->change())) {
      leases_.push_back(lease);
      matrices.push_back(weights.matrices_of(expert));
      weights.add_expert(work_, set_of(lease->change()), on, expert, lease->bytes());
    } else {  // one after the other: there is room for the patches of one
      weights.take_off(expert, *lease);
      weights.put_on(weights.current_, expert, *lease);
    }
  }
  if (on != nullptr) weights.bring(*on, matrices);
}

PatchedWeights::Pending::~Pending() {
  if (leases_.empty()) return;
  weights_->change(work_);
  for (ExpertStore::Lease* lease : leases_) lease->set_change(weights_->current_);
}

Repatch* PatchedWeights::Pending::of(int target) noexcept {
  const auto found = std::find_if(work_.begin(), work_.end(),
                                  [&](const Repatch& matrix) { return matrix.target == target; });
  return found == work_.end() ? nullptr : &*found;
}

ExpertStore::Change PatchedWeights::page_in(const ExpertStore::Expert& expert, std::span<std::byte> bytes) {
  std::shared_ptr<PatchSet> set;
  {
    const std::lock_guard lock(mutex_);
    set = current_;
  }
  if (set == nullptr) return nullptr;
  std::vector<Repatch> work;
  add_expert(work, nullptr, set.get(), expert, bytes.data());
  const auto held = set->bring(matrices_of(expert));
  for (Repatch& matrix : work) {
    matrix.tiles(0, matrix.tiles());
    matrix.finish();
  }
  return set;
}

void PatchedWeights::bring(PatchSet& set, std::span<const std::vector<int>> matrices) const {
  pool_.run(static_cast<int>(matrices.size()), 1, [&](int begin, int end, int) {
    for (int i = begin; i < end; ++i) (void)set.bring(matrices[at(i)]);
  });
}

std::vector<int> PatchedWeights::matrices_of(const ExpertStore::Expert& expert) const {
  const auto target = [&](ExpertPart part) {
    return weights_.targets()->expert(expert.layer, expert.expert, part);
  };
  return {target(ExpertPart::gate), target(ExpertPart::up), target(ExpertPart::down)};
}

void PatchedWeights::add(std::vector<Repatch>& work, PatchSet* off, PatchSet* on, int target,
                         std::byte* codes) const {
  if (off != nullptr && !off->covers(target)) off = nullptr;
  if (on != nullptr && !on->covers(target)) on = nullptr;
  if (off == nullptr && on == nullptr) return;
  work.push_back({off, on, target, codes});
}

void PatchedWeights::add_expert(std::vector<Repatch>& work, PatchSet* off, PatchSet* on,
                                const ExpertStore::Expert& expert, std::byte* bytes) const {
  const ExpertLayout layout = expert_layout(bundle_.manifest().expert_formats[expert.formats],
                                            at(recipe_.hidden_size), recipe_.block(expert.layer).ffn);
  const auto part = [&](ExpertPart which, std::size_t offset) {
    add(work, off, on, weights_.targets()->expert(expert.layer, expert.expert, which), bytes + offset);
  };
  part(ExpertPart::gate, 0);
  part(ExpertPart::up, layout.up_offset);
  part(ExpertPart::down, layout.down_offset);
}

void PatchedWeights::change(std::span<Repatch> work) const {
  constexpr int kGrain = 16;
  std::size_t tiles = 0;
  for (const Repatch& matrix : work) tiles += matrix.done ? 0 : matrix.tiles();
  if (tiles == 0) return;
  pool_.run(static_cast<int>(tiles), kGrain, [&](int begin, int end, int) {
    std::size_t first = 0;
    for (const Repatch& matrix : work) {
      if (matrix.done) continue;
      const std::size_t from = std::max(at(begin), first), to = std::min(at(end), first + matrix.tiles());
      if (from < to) matrix.tiles(from - first, to - first);
      first += matrix.tiles();
    }
  });
  for (Repatch& matrix : work) {
    if (!matrix.done) matrix.finish();
  }
}

}  // namespace edgert
