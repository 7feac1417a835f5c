// What a set of adapters at given scales makes of a model's packed codes: patches, which are put on and taken
// off by the same pass over one extent of entries.
//
// They come from what the adapters add (compiled_patches.h) or from a file (stored_patches.h). Of a matrix
// that the set does not cover, sparse values are added to products (overlay.h), as what else its adapters
// have is of any.
//
// Threads: bring() and apply() of different matrices may run at once, and apply() of a matrix' tiles; whoever
// applies a matrix for the first time, all of its tiles, calls finished() before anybody else comes to it.
// counts() is for any thread. Ownership: memory is charged to the budget when the set is made.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "adapters/overlay.h"
#include "adapters/patch.h"
#include "platform/memory.h"

namespace edgert {

class PatchSet {
 public:
  // The format of a matrix; nullopt where its codes cannot be changed.
  using FormatOf = std::function<std::optional<FormatId>(int target)>;

  virtual ~PatchSet() = default;
  PatchSet(const PatchSet&) = delete;
  PatchSet& operator=(const PatchSet&) = delete;

  bool covers(int target) const noexcept { return index_[static_cast<std::size_t>(target)] >= 0; }
  bool is_of(const std::vector<AdapterMix::Entry>& entries) const noexcept;
  std::size_t covered() const noexcept { return matrices_.size(); }  // matrices
  std::size_t left() const noexcept { return left_; }  // matrices with sparse values that it does not cover
  std::size_t bytes() const noexcept { return memory_.charged_bytes() + lists_bytes_; }

  // Reads what apply() needs of these matrices, where they are covered and it is not there yet. The lock is
  // to be held until they were applied.
  [[nodiscard]] virtual std::unique_lock<std::mutex> bring(std::span<const int> targets);
  // Whether all that was brought once stays there.
  virtual bool keeps_all() const noexcept;

  // Of a matrix that is covered.
  std::size_t tiles(int target) const noexcept { return (matrix(target).rows + kTileRows - 1) / kTileRows; }
  // Puts the patch of a tile on, or takes it off; `codes` is the packed matrix, whose next tile may be asked
  // for. REQUIRES bring().
  void apply(int target, std::size_t tile, std::byte* codes, bool ask_ahead) noexcept;
  void finished(int target) noexcept { matrices_[place(target)].there = true; }

  PatchCounts counts() const;  // of what has been made so far

 protected:
  struct Matrix {
    FormatId format;
    std::size_t rows;
    std::size_t cols;
    PatchTile* tiles = nullptr;
    PatchEntry* entries = nullptr;
    bool there = false;  // what those point to
  };
  PatchSet(const Targets& targets, const AdapterMix& mix);
  void cover(int target, FormatId format, Targets::Shape shape);
  void leave() noexcept { ++left_; }
  void charge(std::shared_ptr<Budget> budget, std::size_t bytes);  // memory_ and lists, once all are covered
  void count(const PatchCounts& more);

  std::size_t place(int target) const noexcept {
    return static_cast<std::size_t>(index_[static_cast<std::size_t>(target)]);
  }
  const Matrix& matrix(int target) const noexcept { return matrices_[place(target)]; }

  std::vector<AdapterMix::Entry> mix_;  // in the order in which they add
  std::vector<Matrix> matrices_;
  Buffer memory_;

 private:
  // Makes the patch of a tile, and puts it on.
  virtual void make(const Matrix& matrix, int target, std::size_t tile, std::byte* of_tile) noexcept;

  std::vector<std::int32_t> index_;  // by target
  std::size_t left_ = 0;
  std::size_t lists_bytes_ = 0;
  std::unique_ptr<Charge> lists_;
  mutable std::mutex mutex_;
  PatchCounts counts_;
};

// A packed matrix that is to lose one set's patch and to get another's, each null where there is none; the
// sets cover it. It may be done tile by tile, each once, by the product that reads the tiles next: `done`
// says that all of them were. REQUIRES bring() of both.
struct Repatch {
  PatchSet* off;
  PatchSet* on;
  int target;
  std::byte* codes;
  bool done = false;

  std::size_t tiles() const noexcept { return (on != nullptr ? on : off)->tiles(target); }
  void tiles(std::size_t begin, std::size_t end) const noexcept;  // from any thread
  void finish() noexcept;                                         // once all tiles were
};

}  // namespace edgert
