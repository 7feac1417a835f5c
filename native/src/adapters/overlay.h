// Products of matrices that adapters change, row by row: the weights' own, then what the row's adapters add.
//
// Rows of one step may have different adapters, and several each. What a row gets depends on that row and its
// mix alone; its adapters add in the order in which they were made, gains first. Of a gated mix a row takes
// of each matrix the adapters whose gates suit its input best, by their shares (gating.h). Unchanged rows and
// matrices cost nothing.
//
// An adapter that brings tokens adds to columns of y behind the product's own, which hold zeros before.
//
// Threads: one step at a time; add() spreads over the pool. Ownership: borrows products, adapters and mixes
// for the step; its memory is charged to the budget.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "adapters/adapter.h"
#include "kernels/kernels.h"
#include "platform/memory.h"
#include "platform/thread_pool.h"

namespace edgert {

class PatchSet;
struct Repatch;

// A product whose matrix is one of the model's targets.
struct Product : MatMul {
  int target = -1;                           // none
  const std::int32_t* batch_rows = nullptr;  // of its rows; null: those of `gather`, or the row itself
  Repatch* repatch = nullptr;                // of its weights, on the way; null: none
};

// The adapters of a sequence, each with its scale.
struct AdapterMix {
  struct Entry {
    std::shared_ptr<const Adapter> adapter;
    float scale = 1;
  };
  std::vector<Entry> entries;  // of a sequence: by Adapter::order()
  // Of the same entries: weights carry the sparse values that it covers.
  std::shared_ptr<PatchSet> patch = nullptr;
  std::vector<std::int32_t> soft_prompt{};  // tokens past the vocabulary that the sequence begins with
  std::size_t top_k = 0;              // how many a row takes of a matrix, by their gates; 0: all, as they are
  std::size_t added_tokens = 0;       // behind the vocabulary, which one of the adapters brings
  std::size_t rank() const noexcept;  // of all, where each is largest
  // Adds what its adapters change of a row of a table to `out`, `space` being as long.
  void replace_row(int target, std::int32_t row, std::span<float> out, std::span<float> space) const;
  // `to` = `from` and what its adapters add to it; false, and nothing done, where that is nothing.
  bool shift(int target, std::span<const float> from, std::span<float> to) const;
  // Of what it makes of a model, by the contents and scales of its adapters in the order in which they add:
  // what is computed with mixes of the same fingerprint has the same bits. 0 where it changes nothing.
  std::uint64_t fingerprint() const;
};

class Overlay {
 public:
  // `rows`: the most that one multiply() has, all its products together.
  Overlay(std::shared_ptr<Budget> budget, std::size_t rows, int threads);

  // Makes room for steps with this mix, for as long as it lives. Error{budget}. Not during a step.
  void reserve(const std::shared_ptr<const AdapterMix>& mix);
  // Gives the room back if no mix that it was made for lives; false where one does. Not during a step.
  bool trim();

  // The mix of each row of the step that begins; null for none. REQUIRES reserve() of each, and one patch of
  // them all.
  void begin(std::span<const AdapterMix* const> rows);

  // False where no row's adapter changes any of these; else all() is to be computed in their place, and add()
  // called then. The products must live until it returns.
  bool prepare(std::span<const Product> products);
  std::span<const Product> all() const noexcept { return all_; }
  void add(ThreadPool& pool, const KernelTable& kernels);

 private:
  struct Rows {  // of a product, and what each needs
    const std::int32_t* rows = nullptr;
    const std::int32_t* inputs = nullptr;  // its activation row
    const float* scales = nullptr;
    std::size_t count = 0;
  };
  struct Active {
    const Adapter* adapter = nullptr;
    std::vector<float> scales;  // by batch row; 0: not this row's
    float* shares = nullptr;    // of the rows of the product at hand that have it; null: none is gated
    Rows own;                   // of a product that has every row of the batch in order
  };
  struct Task : Rows {
    const Product* product = nullptr;
    const Adapter::Part* part = nullptr;
    bool sparse = false;           // its sparse values are added
    const float* inner = nullptr;  // A x, [count][rank]
  };
  struct Unit {  // the tasks of one product
    std::size_t first_task = 0;
    std::size_t end_task = 0;
    std::size_t rows = 0;  // of the product, and behind them those that adapters bring
    int end_tile = 0;      // of all units' tiles
  };
  struct Block {  // output rows [begin, end), whole tiles but for the last
    std::size_t begin, end;
  };
  struct Place {
    std::int32_t input;  // activation row
    std::int32_t row;    // batch row
  };
  static Place place(const Product& product, std::size_t i) noexcept;
  Rows rows_of(const Product& product, const Active& active);
  void add_task(const Product& product, const Active& active);
  void find_shares(const Product& product);
  void add_block(std::span<const Task> tasks, Block block, float* space, const KernelTable& kernels) const;
  void replace(const Task& task, Block block, float* space, const KernelTable& kernels) const;
  void gain(const Task& task, Block block) const;
  void low_rank(const Task& task, Block block, float* space, const KernelTable& kernels) const;
  void sparse(const Task& task, Block block) const;
  void shift(const Task& task, Block block) const;

  const std::shared_ptr<Budget> budget_;
  const std::size_t max_rows_;
  const int threads_;
  std::vector<std::weak_ptr<const AdapterMix>> reserved_;
  std::size_t adapters_ = 0;  // that there is room for
  std::size_t rank_ = 0;
  Buffer memory_;
  std::int32_t* rows_ = nullptr;    // of a product
  std::int32_t* inputs_ = nullptr;  // its row's activation row
  float* scales_ = nullptr;
  float* shares_ = nullptr;  // of a product's rows, adapter by adapter
  float* inner_ = nullptr;
  float* space_ = nullptr;  // of each thread
  std::size_t used_rows_ = 0;
  std::size_t own_rows_ = 0;  // of which all products of the step have these
  std::size_t used_inner_ = 0;
  std::size_t work_ = 0;  // multiply-adds of add()

  std::vector<Active> active_;
  std::vector<std::size_t> top_k_;  // by batch row; empty where no row's mix is gated
  std::vector<float> scores_;       // of one row
  std::vector<float*> next_shares_;
  const PatchSet* patch_ = nullptr;
  std::vector<Product> all_;
  std::vector<Task> tasks_;
  std::vector<Unit> units_;
};

}  // namespace edgert
