// One step of the decoder over a batch of rows, prefill and decode mixed.
//
// Threads: run() by one thread at a time; it spreads work over the machine's pool.
// Ownership: borrows weights, store, pool and kernels, which must outlive it; owns its scratch memory.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "experts/preloader.h"
#include "experts/store.h"
#include "model/kv_cache.h"
#include "model/linear.h"
#include "model/lossy.h"
#include "model/observer.h"
#include "model/patched_weights.h"
#include "model/recipe.h"
#include "model/router.h"
#include "model/routing.h"
#include "model/scratch.h"
#include "model/weights.h"

namespace edgert {

// One token of one sequence. Rows of a sequence stand in order of position, with their KV space reserved.
struct BatchRow {
  KvSequence* sequence = nullptr;
  std::int64_t position = 0;
  std::int32_t token = 0;
  bool wants_logits = false;
};

struct StepControl {
  const std::atomic<bool>& cancelled;
  std::function<void()> poll;  // may throw to stop the step; may be null
  void check() const;          // called between layers, and between experts
};

// logits of rows[row], [vocab], with the tokens that its adapters bring; valid during the call and free to be
// changed.
using LogitsSink = std::function<void(std::size_t row, std::span<float> logits)>;

class Decoder {
 public:
  Decoder(const Bundle& bundle, const Recipe& recipe, const Weights& weights, ExpertStore& store,
          const KvPool& pool, Machine machine, std::shared_ptr<Budget> budget, const ScratchShape& shape);

  // REQUIRES rows.size() <= shape.rows and tokens inside the vocabulary. Throws what a read threw,
  // Error{cancelled}, or what poll threw; the sequences' lengths are the caller's to advance.
  void run(std::span<const BatchRow> rows, const StepControl& control, const LogitsSink& sink);

  // From the next run on, experts are chosen by `routing` instead of the routers; null: by the routers again.
  // REQUIRES a routing made for this recipe.
  void impose_routing(std::shared_ptr<const ImposedRouting> routing) noexcept {
    imposed_ = std::move(routing);
  }
  // Makes room for sequences with this mix. Error{budget}. Not during a run.
  void reserve(const std::shared_ptr<const AdapterMix>& mix);
  // Gives back the room of those that are gone, once all are; false where one is not. Not during a run.
  bool trim();
  // From the next run on, `observer` is shown what happens; null: nobody. It changes nothing.
  void observe(Observer* observer) noexcept { observer_ = observer; }
  // From the next run on, single rows are looked ahead of; null: no longer.
  void look_ahead(Preloader* preloader) noexcept { preloader_ = preloader; }
  // Whose patches the experts of each run get.
  void patch(PatchedWeights* patched) noexcept { patched_ = patched; }
  // From the next run on.
  void set_lossy(const LossyModes& modes) noexcept { lossy_ = modes; }
  const LossyModes& lossy() const noexcept { return lossy_; }
  LossyCounts lossy_counts() const noexcept { return {replaced_, skipped_, low_precision_}; }
  // The experts that an MoE layer used for the last row of the last run, ascending; kNoExpert for those left
  // out.
  std::span<const std::int32_t> last_experts(int layer) const noexcept;

 private:
  // Rows of a sequence at consecutive positions.
  struct RowRun {
    std::size_t first;
    int count;
  };
  void embed(std::span<const BatchRow> rows);
  // The keys and values that adapters give some rows' tokens, in place of the computed ones.
  void give_kv(const AttentionWeights& weights, std::span<const BatchRow> rows);
  // Sequence mixing of a layer: from normed rows to `projected`.
  void mix(int layer, std::span<const BatchRow> rows);
  void mix(int layer, const AttentionRecipe& a, const AttentionWeights& w, Activations& in,
           std::span<const BatchRow> rows);
  void mix(int layer, const LatentAttentionRecipe& a, const LatentAttentionWeights& w, Activations& in,
           std::span<const BatchRow> rows);
  void mix(int layer, const GatedDeltaRecipe& d, const GatedDeltaWeights& w, Activations& in,
           std::span<const BatchRow> rows);
  void mix(int layer, const ShortConvRecipe& c, const ShortConvWeights& w, Activations& in,
           std::span<const BatchRow> rows);
  void absorb_queries(int layer, const LatentAttentionRecipe& a, const LatentAttentionWeights& w,
                      std::size_t rows);
  void attend_latent(int layer, const LatentAttentionRecipe& a, std::span<const BatchRow> rows);
  void convolve(Convolution work, std::size_t offset, std::span<const BatchRow> rows);
  void delta_rule(const GatedDeltaRecipe& d, std::size_t offset, std::span<const BatchRow> rows);
  std::vector<Product> products_by_head(const Matrix& matrix, std::size_t heads, const Activations& in,
                                        float* y, std::size_t y_stride);
  void project_qkv(const AttentionRecipe& recipe, const AttentionWeights& weights, float norm_eps,
                   std::size_t rows);
  void find_angles(const RopeRecipe& rope, std::span<const BatchRow> rows);
  void rotate(const RopeRecipe& rope, std::size_t row, float* x) const;
  void rotate(const AttentionRecipe& recipe, std::span<const BatchRow> rows);
  template <typename Joins>  // joins(i): row i goes with row i - 1, which is the one before it in its
                             // sequence
  void find_runs(std::span<const BatchRow> rows, int at_most, std::vector<RowRun>& runs,
                 Joins&& joins) const {
    runs.clear();
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const bool follows = i > 0 && rows[i].sequence == rows[i - 1].sequence &&
                           rows[i].position == rows[i - 1].position + 1 && runs.back().count < at_most;
      if (follows && joins(i)) {
        ++runs.back().count;
      } else {
        runs.push_back({i, 1});
      }
    }
  }
  void attend(int layer, const AttentionRecipe& recipe, const float* sinks, std::span<const BatchRow> rows);
  void ffn(int layer, std::span<const BatchRow> rows, const StepControl& control);
  void gated_ffn(int layer, const GatedFfnWeights& weights, Activations& in, float* out);
  Activations activate(const FfnRecipe& recipe, std::size_t width, std::size_t rows, bool integer);
  void route(int layer, std::span<const BatchRow> rows);
  void give_up(int layer, std::size_t rows, const std::function<RouterRow(std::size_t)>& row_at);
  std::size_t group_by_expert(const FfnRecipe& recipe, std::size_t rows);
  void routed_experts(int layer, Activations& in, const StepControl& control);
  void prefetch_after(int layer, std::size_t used);
  void look_ahead_of(int layer, std::span<const std::int32_t> experts);
  struct ExpertWork {
    ExpertStore::Lease lease;
    std::size_t first;  // of its rows in grouped_rows and expert_out
    std::size_t count;  // of its rows
    std::size_t row;    // of its rows in gate and up
  };
  std::unique_ptr<PatchedWeights::Pending> patch_experts(int layer, std::span<ExpertWork> group);
  void run_experts(int layer, std::span<const ExpertWork> group, std::size_t rows, const Activations& in,
                   PatchedWeights::Pending* patches);
  void weigh_inner(std::span<const ExpertWork> group, std::size_t width);
  void observe_experts(int layer, Site site, std::span<const ExpertWork> group, const Activations& in);
  void observe_output(std::size_t rows);
  void observe(int layer, Site site, const Activations& in) {
    if (observer_ != nullptr) observer_->input(layer, site, {in.x, in.stride, in.rows});
  }
  void combine(const BlockRecipe& block, const LayerWeights& weights, std::size_t rows);
  void output(std::span<const BatchRow> rows, const StepControl& control, const LogitsSink& sink);
  // `row`: of the step, whose adapters may change the weight. x is not y.
  void norm(Norm kind, const NormWeights& weights, float eps, std::size_t row, const float* x,
            float* y) const;
  Activations normed(const NormWeights& weights, const BlockRecipe& block, std::size_t rows);
  Activations normed(const float* weight, const BlockRecipe& block, std::size_t rows) {
    return normed(NormWeights{.weight = weight}, block, rows);
  }
  // y is normed first where there is a weight for it.
  void add_residual(float* y, const float* post_norm, const BlockRecipe& block, std::size_t rows);

  std::size_t hidden() const noexcept { return static_cast<std::size_t>(recipe_.hidden_size); }

  const Bundle& bundle_;
  const Recipe& recipe_;
  const Weights& weights_;
  ExpertStore& store_;
  const KvLayout& kv_;
  const StateLayout& state_;
  const std::shared_ptr<Budget> budget_;
  Overlay overlay_;
  Machine machine_;
  std::vector<const AdapterMix*> mixes_;  // of this step's rows
  ScratchShape shape_;
  std::shared_ptr<const ImposedRouting> imposed_;
  Observer* observer_ = nullptr;
  LossyModes lossy_;
  std::atomic<std::uint64_t> replaced_{0};  // uses of experts, by all runs
  std::atomic<std::uint64_t> skipped_{0};
  std::atomic<std::uint64_t> low_precision_{0};
  Preloader* preloader_ = nullptr;
  PatchedWeights* patched_ = nullptr;
  std::vector<int> moe_rows_;            // by layer: which of those with routed experts it is
  std::vector<RowRun> attended_;         // rows that attend together
  std::vector<RowRun> runs_;             // whole ones, of this step
  const RopeRecipe* rotated_ = nullptr;  // whose angles of this step's rows are in s_.rotation
  Buffer memory_;
  Scratch s_;
  std::size_t added_tokens_ = 0;  // that there is room for in
  Buffer wide_logits_;            // [logit_rows][vocab and those]
};

}  // namespace edgert
