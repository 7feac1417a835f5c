// What a set of adapters at given scales makes of a model's packed codes, kept as patches.
//
// The patch of a matrix is made of its codes as the bundle has them, the first time that it is wanted, and
// kept: from then on putting it on and taking it off are the same pass over one extent of entries. Of a
// matrix that the set does not cover, sparse values are added to products (overlay.h), as what else its
// adapters have is of any: where codes are no evenly spaced numbers, or remainders are missing.
//
// Threads: apply() of different tiles may run at once, others too while a matrix is not the same; whoever
// applies a matrix for the first time, all of its tiles, calls compiled() before anybody else comes to it.
// counts() is for any thread. Ownership: memory is charged to the budget when the set is made.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "adapters/overlay.h"
#include "adapters/patch.h"
#include "platform/memory.h"

namespace edgert {

class PatchSet {
 public:
  // The format of a matrix; nullopt where its codes cannot be changed.
  using FormatOf = std::function<std::optional<FormatId>(int target)>;

  // REQUIRES adapters of these targets, each once. Error{budget} where the memory is not there.
  PatchSet(const Targets& targets, const FormatOf& format_of, const AdapterMix& mix,
           std::shared_ptr<Budget> budget);

  bool covers(int target) const noexcept { return index_[static_cast<std::size_t>(target)] >= 0; }
  bool is_of(const std::vector<AdapterMix::Entry>& entries) const noexcept;
  std::size_t covered() const noexcept { return matrices_.size(); }  // matrices
  std::size_t left() const noexcept { return left_; }  // matrices with sparse values that it does not cover
  std::size_t bytes() const noexcept { return memory_.charged_bytes() + lists_bytes_; }

  // Of a matrix that is covered.
  std::size_t tiles(int target) const noexcept { return (matrix(target).rows + kTileRows - 1) / kTileRows; }
  // Puts the patch of a tile on, or takes it off; `codes` is the packed matrix, whose next tile may be asked
  // for.
  void apply(int target, std::size_t tile, std::byte* codes, bool ask_ahead) noexcept;
  void compiled(int target) noexcept {
    matrices_[static_cast<std::size_t>(index_[static_cast<std::size_t>(target)])].compiled = true;
  }

  PatchCounts counts() const;  // of what has been compiled

 private:
  struct Matrix {
    FormatId format;
    bool compiled = false;
    std::size_t rows;
    std::size_t cols;
    std::size_t tile;   // of tiles_
    std::size_t entry;  // of entries_
  };
  struct Tile {
    std::uint64_t first = 0;  // of its entries, among the matrix' own
    std::uint64_t count = 0;
  };
  const Matrix& matrix(int target) const noexcept {
    return matrices_[static_cast<std::size_t>(index_[static_cast<std::size_t>(target)])];
  }
  void compile(const Matrix& matrix, int target, std::size_t tile, std::byte* of_tile) noexcept;

  std::vector<AdapterMix::Entry> mix_;  // in the order in which they add
  std::vector<Matrix> matrices_;
  std::vector<std::int32_t> index_;  // by target
  std::size_t left_ = 0;
  std::size_t lists_bytes_ = 0;
  std::unique_ptr<Charge> lists_;
  Buffer memory_;
  Tile* tiles_ = nullptr;
  PatchEntry* entries_ = nullptr;
  mutable std::mutex mutex_;
  PatchCounts counts_;
};

// A packed matrix that is to lose one set's patch and to get another's, each null where there is none; the
// sets cover it. It may be done tile by tile, each once, by the product that reads the tiles next: `done`
// says that all of them were.
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
