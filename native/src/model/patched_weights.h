// The patches of adapters that a model's weights carry now.
//
// One set of adapters is on at a time, or none. Dense matrices take a set's patches at the switch; an expert
// does as it is paged in, or when it is used next: its slot says which set it carries. Evicting it drops
// them with its bytes; nothing is ever written back.
//
// Threads: page_in() runs on reader's threads, beside steps; the others are for the thread that steps,
// between steps but for Pending. Ownership: borrows weights, store and pool; a set lives as long as weights
// carry it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "adapters/stored_patches.h"
#include "experts/store.h"
#include "model/weights.h"
#include "platform/thread_pool.h"

namespace edgert {

class PatchedWeights {
 public:
  // The store may be made later than this, before the first call.
  PatchedWeights(const Bundle& bundle, const Recipe& recipe, const Weights& weights, ExpertStore& store,
                 ThreadPool& pool)
      : bundle_(bundle), recipe_(recipe), weights_(weights), store_(store), pool_(pool) {}

  std::shared_ptr<PatchSet> make(const AdapterMix& mix, std::shared_ptr<Budget> budget) const;
  // Those of a file, whose patches of experts stay in memory once they were read, or do not.
  std::shared_ptr<PatchSet> stored(const AdapterMix& mix, PatchFile file, bool keep,
                                   std::shared_ptr<Budget> budget) const;

  std::uint64_t bytes_read() const noexcept { return *bytes_read_; }  // of patches in files

  // From now on weights are those of `set`; null: the bundle's.
  void use(const std::shared_ptr<PatchSet>& set);
  const std::shared_ptr<PatchSet>& current() const noexcept { return current_; }
  // Takes the set off all that carries it.
  void remove(const std::shared_ptr<PatchSet>& set);

  // Leased experts of a layer on their way from the set that they carry to the one that is on. Products take
  // the matrices over by of(); what none has taken is done as this goes. REQUIRES leases that outlive it.
  class Pending {
   public:
    Pending() = default;
    Pending(const PatchedWeights& weights, int layer, std::span<ExpertStore::Lease* const> leases);
    ~Pending();
    Pending(const Pending&) = delete;
    Pending& operator=(const Pending&) = delete;
    Repatch* of(int target) noexcept;  // null where the matrix stays

   private:
    const PatchedWeights* weights_ = nullptr;
    std::vector<ExpertStore::Lease*> leases_;
    std::vector<Repatch> work_;
  };
  ExpertStore::Change page_in(const ExpertStore::Expert& expert, std::span<std::byte> bytes);

  // Takes every patch off and compares what is resident with the bundle's checksums, but for experts that are
  // split; how many tensors and experts those were. Error{corrupt} names what differs.
  std::size_t check();

 private:
  PatchSet::FormatOf formats() const;
  void bring(PatchSet& set, std::span<const std::vector<int>> matrices) const;  // on every thread
  std::vector<int> matrices_of(const ExpertStore::Expert& expert) const;
  void add(std::vector<Repatch>& work, PatchSet* off, PatchSet* on, int target, std::byte* codes) const;
  void add_expert(std::vector<Repatch>& work, PatchSet* off, PatchSet* on, const ExpertStore::Expert& expert,
                  std::byte* bytes) const;
  // Puts a set's patches on an expert that carries none, or takes those off that it carries: also where the
  // file that has them is no more what it was, for then the expert is read anew.
  void put_on(const std::shared_ptr<PatchSet>& set, const ExpertStore::Expert& expert,
              ExpertStore::Lease& lease) const;
  void take_off(const ExpertStore::Expert& expert, ExpertStore::Lease& lease) const;
  void flip(PatchSet& set, const ExpertStore::Expert& expert, std::byte* bytes) const;
  void change(std::span<Repatch> work) const;  // what is not done, on every thread

  const Bundle& bundle_;
  const Recipe& recipe_;
  const Weights& weights_;
  ExpertStore& store_;
  ThreadPool& pool_;
  const std::shared_ptr<std::atomic<std::uint64_t>> bytes_read_ =
      std::make_shared<std::atomic<std::uint64_t>>(0);
  std::mutex mutex_;  // of current_, for readers' threads
  std::shared_ptr<PatchSet> current_;
};

}  // namespace edgert
