// Routed experts: slots, residency, eviction, prefetch, accounting to the byte.
//
// A step asks for the experts of one layer and gets leases one by one, hits first, then misses as their reads
// complete. Any set goes through any number of slots >= 2: what does not fit waits until a lease is given
// back. A slot takes what its expert weighs on disk, rounded up to the read alignment and the page; the
// capacity is charged to the budget when the store is made, so that no step can find it gone. resize()
// changes it while steps run: what is leased or being read beyond a smaller capacity goes as it comes free.
//
// An expert whose precision is split (see ExpertEntry) may be asked for with its base alone, which takes a
// slot of its own size; whoever needs the whole makes it whole, by a read of the refinement where the base is
// there. Reads ahead of need are of whole experts.
//
// What is asked for ahead of need (prefetch(), preload(), fill()) is read a few at a time while no demand
// read is under way and no request waits for a slot. It evicts nothing that is leased or awaited, and for a
// mere likelihood nothing that is as likely to be needed. What was only likely is read in pieces, and given
// up between two of them once its layer has come without it or something is needed now. A failure stops it
// and is not reported: the demand read of that expert will report its own. Each prefetch read that completes
// begins the next.
//
// Threads: acquire() and Request are for one step at a time; completions run on the reader's threads;
// everything else may be called from any thread.
// Ownership: borrows the bundle and the reader. Lease and Request must not outlive the store. REQUIRES: no
// lease of a request is held while next() is called; a join where an expert is split.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "bundle/bundle.h"
#include "experts/eviction.h"
#include "experts/slots.h"
#include "platform/error.h"
#include "platform/memory.h"
#include "storage/reader.h"

namespace edgert {

// Every expert asked for by a step is a hit, a prefetch hit or a miss.
struct ExpertStatistics {
  std::uint64_t hits = 0;           // resident, and not by a prefetch that this is the first to use
  std::uint64_t prefetch_hits = 0;  // resident by a prefetch that this is the first to use
  std::uint64_t misses = 0;         // not resident, though a prefetch may have been reading it
  std::uint64_t evictions = 0;
  std::uint64_t demand_bytes = 0;       // read from storage, padding and rereads included
  std::uint64_t prefetched_bytes = 0;   // likewise, ahead of need
  std::uint64_t prefetches = 0;         // experts that reads ahead of need began with
  std::uint64_t prefetches_late = 0;    // of them, those asked for while they were read: misses
  std::uint64_t prefetches_wasted = 0;  // evicted or given up before anybody asked for them
  std::uint64_t wasted_bytes = 0;       // read for those
  double stall_s = 0;                   // a step waited for a read
  std::uint64_t base_reads = 0;         // misses that read a base alone
  std::uint64_t refinements = 0;        // misses that read what a base lacked
  std::uint64_t prefetching = 0;        // experts being prefetched, or waiting for it
  std::uint64_t resident = 0;
  std::uint64_t total = 0;
  std::uint64_t slot_bytes = 0;  // in use now
  std::uint64_t capacity_bytes = 0;
};

class ExpertStore {
 public:
  enum class Residency : std::uint8_t { absent, reading, resident };
  // Most of a disk's speed, and soon out of a demand read's way.
  static constexpr int kPrefetchDepth = 2;
  // What was made of an expert's bytes since they were read, for whoever made it; null: nothing. Its slot
  // holds it, and forgets it with the bytes.
  using Change = std::shared_ptr<void>;
  struct Expert {
    int layer;
    int expert;
    std::uint32_t formats;  // index into Manifest::expert_formats
  };
  // Runs on a reader's thread when an expert's bytes are in, checked and whole, before it is published.
  using PageInHook = std::function<Change(const Expert& expert, std::span<std::byte> bytes)>;
  // Makes a split expert whole at the beginning of `slot`, in which the refinement lies where the extent has
  // it; returns the bytes of the whole.
  using Join = std::function<std::size_t(int layer, std::uint32_t formats, std::span<const std::byte> base,
                                         std::span<const std::byte> refinement, std::span<std::byte> slot)>;

  ExpertStore(const Bundle& bundle, std::shared_ptr<Budget> budget, Reader& reader,
              std::uint64_t capacity_bytes, Eviction eviction, Join join = {});
  ~ExpertStore();  // waits for the reads in flight
  ExpertStore(const ExpertStore&) = delete;
  ExpertStore& operator=(const ExpertStore&) = delete;

  class Lease {
   public:
    Lease(Lease&& other) noexcept;
    Lease& operator=(Lease&&) = delete;
    Lease(const Lease&) = delete;
    ~Lease();
    int expert() const noexcept { return expert_; }
    std::uint32_t formats() const noexcept { return formats_; }  // index into Manifest::expert_formats
    bool base() const noexcept { return base_; }                 // data() is the base alone
    const std::byte* data() const noexcept { return data_; }
    // The bytes may be changed by the step that holds the lease, of an expert that is whole.
    std::byte* bytes() const noexcept { return data_; }
    const Change& change() const noexcept { return change_; }
    void set_change(Change change);

   private:
    friend class ExpertStore;
    Lease(ExpertStore* store, int entry, bool base) noexcept;
    ExpertStore* store_;
    int entry_;
    int expert_;
    std::uint32_t formats_;
    bool base_;
    std::byte* data_;
    Change change_;
  };

  class Request {
   public:
    ~Request();
    Request(const Request&) = delete;
    Request& operator=(const Request&) = delete;
    // The next expert that is ready; nullopt after the last. Throws what its read threw, or Error{cancelled}.
    std::optional<Lease> next();
    // The same without waiting: nullopt where none is ready. Leases may be held meanwhile.
    std::optional<Lease> next_ready();

   private:
    friend class ExpertStore;
    void gather();                // with the lock held
    std::optional<Lease> take();  // with the lock held
    Request(ExpertStore& store, const std::atomic<bool>& cancelled) : store_(store), cancelled_(cancelled) {}
    ExpertStore& store_;
    const std::atomic<bool>& cancelled_;
    bool scans_ = false;
    std::vector<int> ready_;  // entries pinned for us, last first
    struct Read {
      int entry;
      bool whole;  // the base alone does not suffice
      bool ours;   // else another request began it: its failure is not ours to report
    };
    struct Wanted {
      int entry;
      bool whole;
    };
    std::vector<Read> reading_;    // entries pinned for us whose read is under way
    std::vector<Wanted> waiting_;  // entries without a slot yet, or that are not whole, last first
  };

  // `experts`: distinct ids of `layer` (a layer number of the recipe). `base_suffices`: where 1, the base of
  // a split expert will do; empty: nowhere.
  std::unique_ptr<Request> acquire(int layer, std::span<const int> experts,
                                   const std::atomic<bool>& cancelled,
                                   std::span<const std::uint8_t> base_suffices = {});

  // Asks ahead for the experts that `layer` is expected to need, the surest first. What an earlier call asked
  // for and has not begun is dropped; so is what remains when the layer is acquired.
  void prefetch(int layer, std::span<const int> experts);
  // Asks ahead for the experts of the layer to come that are likelier to be used than not, by the eviction
  // policy's view or else by what expect() said; likewise dropped.
  void preload(int layer);
  void cancel_prefetch();
  // How likely each expert of a layer is to be used when the layer runs next, by expert: for the eviction
  // policy, which may heed it. REQUIRES one number an expert.
  void expect(int layer, std::span<const float> probabilities);
  // Asks for every expert, in the order of the files, after what prefetch() asks for; never evicts.
  void fill();

  // From the next read on; REQUIRES at least 0: so many reads ahead of need at a time, none at 0.
  void set_prefetch_depth(int reads);
  int prefetch_depth() const;
  // Memory beyond a smaller capacity is given back to the system before this returns, but for what is leased
  // or being read. Error{budget} below least_bytes() and where the budget does not hold what is added.
  void resize(std::uint64_t capacity_bytes);
  std::uint64_t least_bytes() const noexcept;  // two of the largest slots, or what there is

  void set_page_in_hook(PageInHook hook);  // REQUIRES that nothing was asked for yet
  // Shows every expert that is resident and whole, one after the other. REQUIRES no request under way.
  using Visit = std::function<void(const Expert& expert, Lease& lease)>;
  void visit(const Visit& visit);
  // Reads a leased expert's bytes anew, and checks them: those that were there may be any. It has no change
  // then. Throws what reading throws, or Error{corrupt}.
  void reread(Lease& lease);
  ExpertStatistics statistics() const;
  // By expert of a layer, 1 where it is resident or being read as a whole, else 0. REQUIRES one byte an
  // expert.
  void at_hand(int layer, std::span<std::uint8_t> experts) const;
  // One entry an expert, layer after layer in the manifest's order.
  std::vector<std::vector<Residency>> residency() const;

  static std::uint64_t slot_bytes(const ExpertEntry& expert) noexcept;
  // What joining takes beside the slots: the largest base, 0 where no expert is split.
  static std::uint64_t join_bytes(const Manifest& manifest) noexcept;
  // What knowing of so many experts takes beside their slots, the manifest's rows included.
  static std::uint64_t index_bytes(Eviction eviction, std::span<const int> experts_by_layer) noexcept;
  // A step that wants most of a layer wants most of every layer, one after the other: what is there already
  // serves the next such step better than what it reads in passing.
  static bool is_scan(std::size_t layer_experts, std::size_t wanted) noexcept {
    return 2 * wanted > layer_experts;
  }

 private:
  enum class Part : std::uint8_t { whole, base, refinement };
  struct Entry {
    int layer = 0;
    int expert = 0;
    const ExpertEntry* where = nullptr;  // the manifest's
    Expert name() const noexcept { return {layer, expert, where->formats}; }
    Residency state = Residency::absent;
    int pins = 0;
    bool reread = false;
    bool prefetched = false;    // being read or resident by a prefetch, and not asked for since
    bool ahead = false;         // asked for by prefetch() or preload() for a layer to come
    float expected = 0;         // by expect(): how likely it is to be used when its layer runs next
    std::size_t submitted = 0;  // bytes, of its read
    Part part = Part::whole;    // that is there or being read
    SlotPool::Slot slot;
    SlotPool::Slot base_slot;  // while a refinement is being read: what it refines
    Change change;             // of the resident bytes
    std::exception_ptr error;  // of the last read, for those who wait for it
  };
  struct Row {
    int layer;
    int first;  // entry of expert 0
    int count;
  };

  const Row& row(int layer) const;
  int entry_of(const Row& row, int expert) const;  // Error{invalid_argument}
  std::string name(const Entry& entry) const;
  Error damaged(const Entry& entry, std::size_t bytes) const;
  void complete(int entry, std::exception_ptr error) noexcept;
  std::span<std::byte> part_of_slot(const Entry& entry) const noexcept;  // that is read, without padding
  std::span<std::byte> make_whole(const Entry& entry);                   // without the lock; the expert
  void unpin(int entry) noexcept;

  // With the lock held:
  void join(Request& request, int entry, bool whole);  // REQUIRES the entry not absent
  bool suits(const Entry& entry, bool whole) const noexcept {
    return entry.state == Residency::resident && (!whole || entry.part != Part::base);
  }
  void issue(Request& request);
  bool begin_demand(int entry, bool whole);  // false where there is no slot yet
  // The memory of what `spare` admits may go for it.
  std::optional<SlotPool::Slot> take_slot(std::uint64_t bytes,
                                          const std::function<bool(const Entry&)>& spare);
  void evict(int entry) noexcept;
  bool evictable(int entry) const noexcept;
  // Evicts at most so many of what is beyond the capacity; true where there may be more to evict.
  bool trim(int most) noexcept;
  void give_back(SlotPool::Slot slot) noexcept;
  void settle_charge() noexcept;
  void choose_policy();
  void drop_slot(SlotPool::Slot& slot) noexcept;
  void drop_slots(Entry& entry) noexcept;
  void begin(int entry, SlotPool::Slot slot, Part part, ReadPriority priority);  // may throw
  void submit(int entry);                                                        // may throw
  int& reads_of(const Entry& entry) noexcept;
  bool in_need() const noexcept;  // a demand read is under way, or a request waits for a slot
  void abandon(int entry) noexcept;
  double likelihood(int entry, double otherwise) const;
  void pump() noexcept;
  bool pump_one();  // false: nothing to do now; may throw
  bool next_absent(std::vector<int>& queue) const;
  void drop_ahead() noexcept;

  const Bundle& bundle_;
  const Eviction eviction_;
  const std::uint64_t index_bytes_;
  std::uint64_t capacity_;  // below, with the lock held
  Charge charge_;
  Reader& reader_;
  std::unique_ptr<EvictionPolicy> policy_;
  bool evicts_ = true;  // else every expert fits, and the policy is the one that costs nothing
  const int process_;
  PageInHook hook_;
  const Join join_;
  std::mutex join_mutex_;
  const Buffer join_space_;  // a base, while it is joined

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  SlotPool slots_;
  std::vector<Entry> entries_;
  std::vector<Row> rows_;
  std::vector<const Request*> requests_;
  int demand_reads_ = 0;  // in flight
  int prefetch_reads_ = 0;
  int prefetch_depth_ = kPrefetchDepth;
  std::vector<int> asked_;  // entries that prefetch() or preload() asked for
  std::vector<int> ahead_;  // of them, those that it has not come to, last first
  bool ahead_scans_ = false;
  bool guesses_ = false;   // preload() asked
  int passed_layer_ = -1;  // of the last request, if it was a scan
  std::vector<int> fill_;  // the same of fill()
  ExpertStatistics statistics_;
};

}  // namespace edgert
