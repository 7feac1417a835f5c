// One adapter, resident: what it adds to the product of each matrix that it changes, row by row.
//
//   y + scale * ((W' x - y) + gain * y + B (A x) + S x + shift)
//
// with A, B of low rank (LoRA), S sparse (SHiRA), gain a vector (IA3; DoRA's magnitudes), shift one (trained
// biases), and W' rows in place of the weights' own (layers trained whole, trained tokens). A part may have
// all of them; weights stay as they are. A gate says how well a part suits an input, for mixtures of
// adapters that choose row by row (overlay.h). Of a norm only its weight's shift can be changed, of a table
// its rows; a table can get more rows.
//
// An adapter can bring tokens: then the embedding and the output have rows for them behind their own, all of
// which it gives weights. These are whole at any scale, for there is nothing that they would take the place
// of.
//
// Threads: immutable. Ownership: its memory is charged to the budget of the model that it was made for.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "adapters/targets.h"
#include "platform/memory.h"
#include "quant/format.h"
#include "quant/pack.h"

namespace edgert {

// As an adapter's file has it. Row-major; empty where there is none.
struct AdapterSource {
  std::string target;
  SourceType type = SourceType::f32;   // of the factors and of W'
  std::size_t rank = 0;                // 0: no factors
  float factor_scale = 1;              // of B A
  std::span<const std::byte> a;        // [rank, cols]
  std::span<const std::byte> b;        // [rows, rank]
  std::span<const std::int32_t> rows;  // of the sparse values, in any order
  std::span<const std::int32_t> cols;
  std::span<const float> values;
  // What the codes of the weights there lack of the floats they were made of, in steps of 1/200 of a code
  // (quant/pack.h); empty where nobody knows. Patches need them.
  std::span<const std::int8_t> remainders;
  std::span<const float> gain;                // [rows], 0 changes nothing
  bool gain_spares_bias = false;              // y is taken without the bias
  std::span<const float> shift;               // [rows]; of a norm [cols]
  std::span<const std::byte> weights;         // W', [n, cols]
  std::span<const std::int32_t> weight_rows;  // [n] which they are, ascending; empty: all, in order
  std::span<const float> gate;                // [cols]
};

class Adapter : public std::enable_shared_from_this<Adapter> {
 public:
  struct Part {
    std::size_t rows = 0;      // with those of the tokens that the adapter brings
    std::size_t own_rows = 0;  // of the matrix itself
    std::size_t cols = 0;
    FormatId format = FormatId::f32;
    std::size_t rank = 0;  // 0: no factors
    float factor_scale = 1;
    const std::byte* a = nullptr;
    const std::byte* b = nullptr;
    // Sparse values, tile after tile (of kTileRows rows), by column and then by row: as packed codes lie.
    const std::uint32_t* first = nullptr;   // [tiles + 1], of a tile's; null: none
    const std::uint32_t* places = nullptr;  // in their tile: kTileRows * column + row
    const float* values = nullptr;
    const std::int8_t* remainders = nullptr;  // null: unknown
    const float* gain = nullptr;              // null: none
    bool gain_spares_bias = false;
    const float* shift = nullptr;               // null: none
    const std::byte* weights = nullptr;         // null: none
    std::size_t weight_count = 0;               // rows of them
    const std::int32_t* weight_rows = nullptr;  // null: all, in order
    const float* gate = nullptr;                // standardised, as its inputs are to be; null: none
    // Adds scale * (the weights' row - out) to `out`, `space` being as long; false where that row is not
    // there.
    bool replace_row(std::int32_t row, float scale, std::span<float> out, std::span<float> space) const;
    // Of a row's weights.
    float scale_of(std::size_t row, float scale) const noexcept {
      return row >= own_rows && row < rows && scale != 0 ? 1 : scale;
    }
    // Where a row stands among the weights; -1: not there.
    std::ptrdiff_t weight_of(std::int32_t row) const noexcept;
  };

  // Error{invalid_argument} names the target where shapes or indices do not fit it, a number is not finite or
  // an element stands twice; Error{budget} where the memory is not there. `order`: see order(); 0: after all
  // that were made with 0 so far. `added_tokens`: how many it brings.
  Adapter(std::shared_ptr<const Targets> targets, std::span<const AdapterSource> sources,
          std::shared_ptr<Budget> budget, const std::string& name, std::uint64_t order = 0,
          std::size_t added_tokens = 0);
  // One of which nothing is in memory, since patches carry all of it (stored_patches.h).
  Adapter(std::shared_ptr<const Targets> targets, std::uint64_t fingerprint, std::shared_ptr<Budget> budget,
          const std::string& name, std::uint64_t order);
  // What fingerprint() is of these. REQUIRES targets that differ.
  static std::uint64_t fingerprint_of(std::span<const AdapterSource> sources);

  bool belongs_to(const std::shared_ptr<const Targets>& targets) const noexcept {
    return targets_ == targets;
  }
  // Null where the adapter leaves the matrix alone.
  const Part* part(int target) const noexcept {
    const std::int32_t index = target < 0 ? -1 : index_[static_cast<std::size_t>(target)];
    return index < 0 ? nullptr : &parts_[static_cast<std::size_t>(index)];
  }
  const std::string& name() const noexcept { return name_; }
  // Checksum of what it adds to which matrix, whatever its name and the order of its sources.
  std::uint64_t fingerprint() const noexcept { return fingerprint_; }
  // Whether a sequence will be computed with it. REQUIRES one shared_ptr of whoever asks.
  bool in_use() const noexcept { return weak_from_this().use_count() > 1; }
  // Adapters of a row are added in this order, whatever stands beside it in a batch.
  std::uint64_t order() const noexcept { return order_; }
  // A target of its that has no gate; empty where all have one.
  const std::string& ungated() const noexcept { return ungated_; }
  std::size_t added_tokens() const noexcept { return added_tokens_; }
  std::size_t max_rank() const noexcept { return max_rank_; }
  std::size_t bytes() const noexcept { return memory_.charged_bytes() + lists_bytes_; }

 private:
  Targets::Shape shape(int target) const noexcept;
  void check_targets(std::span<const AdapterSource> sources);
  void check_added_tokens(std::span<const AdapterSource> sources) const;

  const std::shared_ptr<const Targets> targets_;
  std::string name_;
  std::uint64_t order_;
  std::size_t added_tokens_;
  std::uint64_t fingerprint_ = 0;
  std::string ungated_;
  std::vector<Part> parts_;
  std::vector<std::int32_t> index_;  // by target
  std::size_t max_rank_ = 0;
  std::size_t lists_bytes_ = 0;
  std::unique_ptr<Charge> lists_;  // parts_ and index_
  Buffer memory_;
};

}  // namespace edgert
