#include "experts/store.h"

#include <unistd.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "bundle/xxhash.h"
#include "platform/error.h"

namespace edgert {
namespace {

// What a demand read may have to wait for of a guess: a larger piece would not be read faster.
constexpr std::size_t kGuessPiece = 512 << 10;

std::size_t at(int index) { return static_cast<std::size_t>(index); }

std::uint64_t base_slot_bytes(const ExpertEntry& expert) {
  return round_up(expert.base_bytes, std::max(File::kDirectAlignment, page_size()));
}

std::vector<std::uint64_t> slot_sizes(const Manifest& manifest) {
  std::vector<std::uint64_t> sizes;
  for (const auto& layer : manifest.experts) {
    for (const ExpertEntry& expert : layer.experts) sizes.push_back(ExpertStore::slot_bytes(expert));
  }
  return sizes;
}

// Then nothing is evicted, and the policy that costs nothing will do.
bool fits(const Manifest& manifest, std::uint64_t capacity_bytes) {
  const std::vector<std::uint64_t> sizes = slot_sizes(manifest);
  return std::reduce(sizes.begin(), sizes.end()) <= capacity_bytes;
}

// Of bases too, which may stand in the place of their experts.
std::vector<std::uint64_t> all_slot_sizes(const Manifest& manifest) {
  std::vector<std::uint64_t> sizes = slot_sizes(manifest);
  for (const auto& layer : manifest.experts) {
    for (const ExpertEntry& expert : layer.experts) {
      if (expert.is_split()) sizes.push_back(base_slot_bytes(expert));
    }
  }
  return sizes;
}

std::vector<int> experts_by_layer(const Manifest& manifest) {
  std::vector<int> counts;
  for (const auto& layer : manifest.experts) counts.push_back(static_cast<int>(layer.experts.size()));
  return counts;
}

}  // namespace

std::uint64_t ExpertStore::index_bytes(Eviction eviction, std::span<const int> experts_by_layer) noexcept {
  const auto experts = at(std::reduce(experts_by_layer.begin(), experts_by_layer.end()));
  const std::uint64_t bytes = experts * (sizeof(Entry) + sizeof(ExpertEntry));
  return round_up(bytes + policy_bytes(eviction, experts_by_layer), page_size());
}

std::uint64_t ExpertStore::slot_bytes(const ExpertEntry& expert) noexcept {
  return round_up(expert.extent.bytes, std::max(File::kDirectAlignment, page_size()));
}

std::uint64_t ExpertStore::join_bytes(const Manifest& manifest) noexcept {
  std::uint64_t largest = 0;
  for (const auto& layer : manifest.experts) {
    for (const ExpertEntry& expert : layer.experts) largest = std::max(largest, expert.base_bytes);
  }
  return round_up(largest, page_size());
}

ExpertStore::ExpertStore(const Bundle& bundle, std::shared_ptr<Budget> budget, Reader& reader,
                         std::uint64_t capacity_bytes, Eviction eviction, Join join)
    : bundle_(bundle),
      eviction_(eviction),
      index_bytes_(index_bytes(eviction, experts_by_layer(bundle.manifest()))),
      capacity_(capacity_bytes),
      charge_(budget, capacity_bytes + index_bytes_, "expert slots"),
      reader_(reader),
      policy_(make_policy(fits(bundle.manifest(), capacity_bytes) ? Eviction::lru : eviction,
                          experts_by_layer(bundle.manifest()))),
      evicts_(!fits(bundle.manifest(), capacity_bytes)),
      process_(getpid()),
      join_(std::move(join)),
      join_space_(std::move(budget), join_bytes(bundle.manifest()), "joining experts"),
      slots_(all_slot_sizes(bundle.manifest()), capacity_bytes) {
  for (const auto& layer : bundle.manifest().experts) {
    rows_.push_back({layer.layer, static_cast<int>(entries_.size()), static_cast<int>(layer.experts.size())});
    for (std::size_t e = 0; e < layer.experts.size(); ++e) {
      Entry& entry = entries_.emplace_back();
      entry.layer = layer.layer;
      entry.expert = static_cast<int>(e);
      entry.where = &layer.experts[e];
    }
  }
  statistics_.total = entries_.size();
  statistics_.capacity_bytes = capacity_;
}

ExpertStore::~ExpertStore() {
  if (getpid() != process_) return;  // forked: the reads in flight end in the process that began them
  std::unique_lock lock(mutex_);
  drop_ahead();
  fill_.clear();
  changed_.wait(lock, [&] { return demand_reads_ + prefetch_reads_ == 0; });
}

const ExpertStore::Row& ExpertStore::row(int layer) const {
  const auto found = std::lower_bound(rows_.begin(), rows_.end(), layer,
                                      [](const Row& r, int wanted) { return r.layer < wanted; });
  if (found == rows_.end() || found->layer != layer) {
    throw Error(ErrorKind::invalid_argument, "layer " + std::to_string(layer) + " has no routed experts");
  }
  return *found;
}

int ExpertStore::entry_of(const Row& row, int expert) const {
  if (expert < 0 || expert >= row.count) {
    throw Error(ErrorKind::invalid_argument, "layer " + std::to_string(row.layer) + ": expert " +
                                                 std::to_string(expert) + ", allowed 0 to " +
                                                 std::to_string(row.count - 1));
  }
  return row.first + expert;
}

std::string ExpertStore::name(const Entry& entry) const {
  return bundle_.file(entry.where->extent.file)->path().string() + ": expert " +
         std::to_string(entry.expert) + " of layer " + std::to_string(entry.layer) + " at offset " +
         std::to_string(entry.where->extent.offset);
}

Error ExpertStore::damaged(const Entry& entry, std::size_t bytes) const {
  return Error(ErrorKind::corrupt,
               name(entry) + " (" + std::to_string(bytes) +
                   " bytes): checksum differs, twice; the bundle is damaged: convert or copy it again");
}

std::unique_ptr<ExpertStore::Request> ExpertStore::acquire(int layer, std::span<const int> experts,
                                                           const std::atomic<bool>& cancelled,
                                                           std::span<const std::uint8_t> base_suffices) {
  std::unique_ptr<Request> request(new Request(*this, cancelled));
  const Row& r = row(layer);
  request->ready_.reserve(experts.size());
  request->reading_.reserve(experts.size());
  request->waiting_.reserve(experts.size());
  const std::lock_guard lock(mutex_);
  request->scans_ = is_scan(at(r.count), experts.size());
  passed_layer_ = request->scans_ ? layer : -1;
  requests_.push_back(request.get());
  if (!asked_.empty() && entries_[at(asked_.front())].layer == layer) drop_ahead();
  for (std::size_t i = 0; i < experts.size(); ++i) {
    const int index = entry_of(r, experts[i]);
    const Entry& entry = entries_[at(index)];
    const bool whole = base_suffices.empty() || base_suffices[i] == 0;
    if (!suits(entry, whole)) {
      ++statistics_.misses;
    } else {
      ++(entry.prefetched ? statistics_.prefetch_hits : statistics_.hits);
    }
    if (entry.state == Residency::reading || suits(entry, whole)) {
      join(*request, index, whole);
    } else {
      request->waiting_.push_back({index, whole});
    }
  }
  policy_->visited(static_cast<int>(&r - rows_.data()), experts, request->scans_);
  std::reverse(request->ready_.begin(), request->ready_.end());
  std::reverse(request->waiting_.begin(), request->waiting_.end());
  issue(*request);
  return request;
}

void ExpertStore::join(Request& request, int index, bool whole) {
  Entry& entry = entries_[at(index)];
  if (entry.state == Residency::reading && entry.prefetched) {
    --prefetch_reads_;
    ++demand_reads_;
    ++statistics_.prefetches_late;
  }
  entry.prefetched = false;
  ++entry.pins;
  request.scans_ ? policy_->passed(index) : policy_->used(index);
  if (entry.state == Residency::resident) {
    request.ready_.push_back(index);
  } else {
    request.reading_.push_back({index, whole, false});
  }
}

void ExpertStore::issue(Request& request) {
  while (!request.waiting_.empty()) {
    const auto [index, whole] = request.waiting_.back();
    Entry& entry = entries_[at(index)];
    if (entry.state == Residency::reading || suits(entry, whole)) {  // another request read it meanwhile
      join(request, index, whole);
    } else {
      if (!begin_demand(index, whole)) return;
      request.scans_ ? policy_->passed(index) : policy_->used(index);
      ++entry.pins;
      request.reading_.push_back({index, whole, true});
    }
    request.waiting_.pop_back();
  }
}

bool ExpertStore::begin_demand(int index, bool whole) {
  Entry& entry = entries_[at(index)];
  if (entry.state == Residency::resident && entry.pins > 0) return false;  // somebody computes with its base
  const bool base = !whole && entry.where->is_split();
  const std::uint64_t bytes = base ? base_slot_bytes(*entry.where) : slot_bytes(*entry.where);
  auto slot = take_slot(bytes, [&](const Entry& other) { return !other.ahead && &other != &entry; });
  if (!slot) slot = take_slot(bytes, [&](const Entry& other) { return &other != &entry; });
  if (!slot) slot = take_slot(bytes, [](const Entry&) { return true; });  // its own base too
  if (!slot) return false;
  const Part part = base ? Part::base : entry.state == Residency::absent ? Part::whole : Part::refinement;
  begin(index, std::move(*slot), part, ReadPriority::demand);
  return true;
}

std::optional<SlotPool::Slot> ExpertStore::take_slot(std::uint64_t bytes,
                                                     const std::function<bool(const Entry&)>& spare) {
  const auto admitted = [&](int index) { return evictable(index) && spare(entries_[at(index)]); };
  if (bytes > capacity_) return std::nullopt;
  const std::uint64_t needed = statistics_.slot_bytes + bytes;
  if (needed > capacity_) {
    const auto size = [&](int index) { return entries_[at(index)].slot.size(); };
    const auto victims = choose_victims(*policy_, needed - capacity_, size, admitted);
    if (!victims) return std::nullopt;
    for (const int index : *victims) evict(index);
    SlotPool::Slot& slot = entries_[at(victims->front())].slot;
    if (victims->size() == 1 && slot.size() == bytes) return std::move(slot);
    for (const int index : *victims) drop_slot(entries_[at(index)].slot);
  }
  SlotPool::Slot slot = slots_.take(bytes);
  statistics_.slot_bytes += bytes;
  return slot;
}

bool ExpertStore::evictable(int index) const noexcept {
  const Entry& entry = entries_[at(index)];
  return entry.state == Residency::resident && entry.pins == 0;
}

void ExpertStore::evict(int index) noexcept {
  Entry& victim = entries_[at(index)];
  policy_->removed(index);
  victim.state = Residency::absent;
  victim.change = nullptr;
  --statistics_.resident;
  ++statistics_.evictions;
  if (std::exchange(victim.prefetched, false)) {
    ++statistics_.prefetches_wasted;
    statistics_.wasted_bytes += victim.submitted;
  }
}

void ExpertStore::drop_slot(SlotPool::Slot& slot) noexcept {
  statistics_.slot_bytes -= slot.size();
  slot = {};
}

void ExpertStore::drop_slots(Entry& entry) noexcept {
  drop_slot(entry.slot);
  drop_slot(entry.base_slot);
}

int& ExpertStore::reads_of(const Entry& entry) noexcept {
  return entry.prefetched ? prefetch_reads_ : demand_reads_;
}

void ExpertStore::begin(int index, SlotPool::Slot slot, Part part, ReadPriority priority) {
  Entry& entry = entries_[at(index)];
  if (part == Part::refinement) entry.base_slot = std::move(entry.slot);
  entry.slot = std::move(slot);
  entry.part = part;
  entry.error = nullptr;
  entry.reread = false;
  entry.submitted = 0;
  entry.prefetched = priority == ReadPriority::prefetch;
  try {
    submit(index);
  } catch (...) {
    drop_slot(entry.slot);
    if (part == Part::refinement) {
      entry.slot = std::move(entry.base_slot);
      entry.part = Part::base;
    }
    throw;
  }
  if (part == Part::refinement) --statistics_.resident;
  if (part == Part::base) ++statistics_.base_reads;
  if (part == Part::refinement) ++statistics_.refinements;
  entry.state = Residency::reading;
  ++reads_of(entry);
  statistics_.prefetches += entry.prefetched ? 1 : 0;
}

std::span<std::byte> ExpertStore::part_of_slot(const Entry& entry) const noexcept {
  const std::span<std::byte> extent =
      entry.slot.span().first(entry.part == Part::base ? entry.where->base_bytes : entry.where->extent.bytes);
  return entry.part == Part::refinement
             ? extent.subspan(ExpertEntry::refinement_offset(entry.where->base_bytes))
             : extent;
}

void ExpertStore::submit(int index) {
  Entry& entry = entries_[at(index)];
  const Extent& extent = entry.where->extent;
  const auto& file = bundle_.file(extent.file);
  const std::span<std::byte> part = part_of_slot(entry);
  const auto offset = static_cast<std::size_t>(part.data() - entry.slot.data());
  // The file ends on a multiple of the bundle's alignment, so the padded read stays inside it.
  const std::size_t left = round_up(part.size(), File::kDirectAlignment) - entry.submitted;
  const bool guess = entry.prefetched && entry.ahead && guesses_;
  const std::size_t bytes = guess ? std::min(left, kGuessPiece) : left;
  const std::size_t from = offset + entry.submitted;
  entry.submitted += bytes;  // first, for the read may complete at once
  reader_.submit({file, extent.offset + from, entry.slot.span().subspan(from, bytes),
                  entry.prefetched ? ReadPriority::prefetch : ReadPriority::demand,
                  [this, index](std::exception_ptr error) { complete(index, std::move(error)); }});
  (entry.prefetched ? statistics_.prefetched_bytes : statistics_.demand_bytes) += bytes;
}

std::span<std::byte> ExpertStore::make_whole(const Entry& entry) {
  const std::span<std::byte> slot = entry.slot.span();
  const ExpertEntry& where = *entry.where;
  if (!where.is_split()) return slot.first(where.extent.bytes);
  const std::size_t offset = ExpertEntry::refinement_offset(where.base_bytes);
  const std::span<std::byte> refinement = slot.subspan(offset, where.extent.bytes - offset);
  if (entry.part == Part::refinement) {
    const auto base = entry.base_slot.span().first(where.base_bytes);
    return slot.first(join_(entry.layer, where.formats, base, refinement, slot));
  }
  const std::lock_guard lock(join_mutex_);
  const std::span<std::byte> base = join_space_.span().first(where.base_bytes);
  std::copy_n(slot.begin(), base.size(), base.begin());
  return slot.first(join_(entry.layer, where.formats, base, refinement, slot));
}

void ExpertStore::complete(int index, std::exception_ptr error) noexcept {
  Entry& entry = entries_[at(index)];  // its slots are ours while it is `reading`
  Change change;
  try {
    if (error) std::rethrow_exception(error);
    const std::span<std::byte> bytes = part_of_slot(entry);
    if (entry.submitted < bytes.size()) {
      const std::lock_guard lock(mutex_);
      const bool wanted = !entry.prefetched || (entry.ahead && !in_need());
      return wanted ? submit(index) : abandon(index);
    }
    const ExpertEntry& where = *entry.where;
    const std::uint64_t checksum = entry.part == Part::whole  ? where.extent.checksum
                                   : entry.part == Part::base ? where.base_checksum
                                                              : where.refinement_checksum;
    if (xxh64(bytes) == checksum) {
      if (entry.part != Part::base) {
        const std::span<std::byte> whole = make_whole(entry);
        if (hook_) change = hook_(entry.name(), whole);
      }
    } else if (!entry.reread) {
      entry.reread = true;
      entry.submitted = 0;
      const std::lock_guard lock(mutex_);
      return submit(index);
    } else {
      throw damaged(entry, bytes.size());
    }
  } catch (...) {
    error = std::current_exception();
  }
  const std::lock_guard lock(mutex_);
  --reads_of(entry);
  if (error) {
    policy_->removed(index);
    entry.state = Residency::absent;
    entry.error = error;
    drop_slots(entry);
    if (entry.prefetched) {
      drop_ahead();
      fill_.clear();
    }
  } else {
    if (entry.part == Part::refinement) entry.part = Part::whole;
    drop_slot(entry.base_slot);
    entry.change = std::move(change);
    entry.state = Residency::resident;
    ++statistics_.resident;
  }
  trim(1);
  changed_.notify_all();
  pump();
}

void ExpertStore::unpin(int index) noexcept {
  const std::lock_guard lock(mutex_);
  --entries_[at(index)].pins;
  trim(1);
  pump();
}

void ExpertStore::set_page_in_hook(PageInHook hook) { hook_ = std::move(hook); }

void ExpertStore::visit(const Visit& visit) {
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    std::unique_lock lock(mutex_);
    Entry& entry = entries_[i];
    if (entry.state != Residency::resident || entry.part == Part::base) continue;
    ++entry.pins;
    Lease lease(this, static_cast<int>(i), false);
    lock.unlock();
    visit(entry.name(), lease);
  }
}

void ExpertStore::reread(Lease& lease) {
  const Entry& entry = entries_[at(lease.entry_)];  // its slot is ours while it is leased
  const Extent& extent = entry.where->extent;
  const std::size_t bytes = round_up(extent.bytes, File::kDirectAlignment);
  bundle_.file(extent.file)->read(extent.offset, entry.slot.span().first(bytes));
  {
    const std::lock_guard lock(mutex_);
    statistics_.demand_bytes += bytes;
  }
  if (xxh64(entry.slot.span().first(extent.bytes)) != extent.checksum) throw damaged(entry, extent.bytes);
  make_whole(entry);
  lease.set_change(nullptr);
}

ExpertStatistics ExpertStore::statistics() const {
  const std::lock_guard lock(mutex_);
  ExpertStatistics out = statistics_;
  out.prefetching = at(prefetch_reads_) + ahead_.size() + fill_.size();
  return out;
}

void ExpertStore::at_hand(int layer, std::span<std::uint8_t> experts) const {
  const Row& r = row(layer);
  const std::lock_guard lock(mutex_);
  for (int i = 0; i < r.count; ++i) {
    const Entry& entry = entries_[at(r.first + i)];
    experts[at(i)] = entry.state != Residency::absent && entry.part != Part::base ? 1 : 0;
  }
}

std::vector<std::vector<ExpertStore::Residency>> ExpertStore::residency() const {
  const std::lock_guard lock(mutex_);
  std::vector<std::vector<Residency>> out;
  for (const Row& r : rows_) {
    auto& states = out.emplace_back();
    for (int i = 0; i < r.count; ++i) states.push_back(entries_[at(r.first + i)].state);
  }
  return out;
}

}  // namespace edgert
