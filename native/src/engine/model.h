// A loaded model: weights, store, KV cache and decoder behind one step.
//
// Where every expert fits, the first step reads what it needs, and what it left is read in the background.
//
// Threads: everything may be called from any thread at any time; steps are taken one after the other.
// Ownership: a sequence keeps the KV cache that it lies in, not its model.
#pragma once

#include <atomic>
#include <exception>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "adapters/overlay.h"
#include "bundle/bundle.h"
#include "engine/pace.h"
#include "engine/prediction.h"
#include "engine/runtime.h"
#include "engine/sampler.h"
#include "experts/store.h"
#include "model/decoder.h"
#include "model/kv_cache.h"
#include "model/observation.h"
#include "model/patched_weights.h"
#include "model/recipe.h"
#include "model/weights.h"
#include "platform/fair_mutex.h"

namespace edgert {

struct ModelOptions {
  std::int64_t context = 0;       // 0: the smaller of the model's and kDefaultContext
  int parallel = 1;               // contexts that the KV cache holds together
  int chunk = 0;                  // rows of a step; 0: as many as pay, by the budget
  std::optional<KvType> kv_type;  // none: f32 where attention is f32, else f16
  Eviction eviction = Eviction::forecast;
  Prediction prefetch = Prediction::automatic;
  MomentsKind moments = MomentsKind::none;  // what to measure of the model as it runs
  LossyModes lossy{};
  std::uint64_t adapter_bytes = 0;  // kept for adapters
  std::uint64_t expert_bytes = 0;   // at most so many for expert slots; 0: what is left
};

// The budget, divided.
struct MemoryPlan {
  std::int64_t context = 0;
  int chunk = 0;
  KvType kv_type = KvType::f16;
  std::uint64_t dense_bytes = 0;
  std::uint64_t kv_bytes = 0;
  std::uint64_t state_bytes = 0;  // of sequence_state.h
  std::uint64_t scratch_bytes = 0;
  std::uint64_t sampler_bytes = 0;
  std::uint64_t observation_bytes = 0;  // sums, where the model is measured
  std::uint64_t expert_bytes = 0;       // of every expert
  std::uint64_t slots_bytes = 0;        // of the budget, for experts
  std::uint64_t resident_bytes = 0;     // the smallest budget that holds every expert
  std::uint64_t minimum_bytes = 0;      // the smallest budget that works
  std::uint64_t token_bytes = 0;        // the experts of one token, at most
  bool resident() const noexcept { return slots_bytes >= expert_bytes; }
};
// Error{budget} names the smallest budget that works.
MemoryPlan plan_memory(const Bundle& bundle, const Recipe& recipe, const Runtime& runtime, int threads,
                       const ModelOptions& options);

// The tensor of the first layer that attends which makes its keys; empty where none does.
std::string key_projection(const Recipe& recipe);

// What a plan needs to know of weights, which need not exist yet.
struct WeightSizes {
  std::string name;                                      // for messages
  std::uint64_t dense_bytes = 0;                         // of dense.bin
  FormatId key_format = FormatId::f32;                   // of key_projection()
  std::vector<std::vector<std::uint64_t>> expert_bytes;  // of every extent, by MoE layer
  std::uint64_t join_bytes = 0;                          // ExpertStore::join_bytes
  std::uint64_t profile_bytes = 0;                       // of the routing profile, as charged
};
MemoryPlan plan_memory(const WeightSizes& weights, const Recipe& recipe, const Runtime& runtime, int threads,
                       const ModelOptions& options);

enum class Wanted { none, last, all };  // logits of a span

struct StepRow {
  KvSequence* sequence = nullptr;
  std::span<const std::int32_t> tokens;
  Wanted wanted = Wanted::none;
};

// logits after tokens[token] of rows[row]; free to be changed during the call.
using StepSink = std::function<void(std::size_t row, std::size_t token, std::span<float> logits)>;

// One row of sample(): a token is drawn after its last one.
struct SampleRow {
  KvSequence* sequence = nullptr;
  std::span<const std::int32_t> tokens;
  Sampler* sampler = nullptr;     // null: no token is drawn
  std::function<bool()> ready{};  // asked before the draw, which it may hold up; false: none is drawn
};

struct ModelStatistics {
  ExpertStatistics experts;
  PreloadStatistics preload;
  std::uint64_t bytes_read = 0;  // dense, experts, prefetched ones too, and patches
  std::uint64_t patch_bytes_read = 0;
  std::uint64_t prefill_tokens = 0;
  std::uint64_t decode_tokens = 0;
  double prefill_s = 0;
  double decode_s = 0;
  LossyCounts lossy;
};

class Model {
 public:
  static constexpr std::int64_t kDefaultContext = 8192;

  // `poll` is called while weights are read and may throw; may be null.
  Model(std::shared_ptr<Runtime> runtime, const std::filesystem::path& path, const ModelOptions& options,
        const std::function<void()>& poll = {});

  const Recipe& recipe() const noexcept { return recipe_; }
  const MemoryPlan& plan() const noexcept { return plan_; }
  Eviction eviction() const noexcept { return eviction_; }
  // The predictor at work; none where every expert stays in memory.
  Prediction prefetch() const noexcept { return prediction_.kind(); }
  // Charged to the budget. See Adapter for errors.
  std::shared_ptr<const Adapter> adapter(const std::string& name, std::span<const AdapterSource> sources,
                                         std::uint64_t order = 0, std::size_t added_tokens = 0) const;
  // One whose patches are in a file: nothing else of it is in memory.
  std::shared_ptr<const Adapter> stored_adapter(const std::string& name, std::uint64_t order,
                                                std::uint64_t fingerprint) const;
  // What an adapter can change by this name. Error{invalid_argument} where it is nothing.
  Targets::Shape target(std::string_view name) const;
  // Tokens past the vocabulary that sequences with this mix begin with; step() puts them before the first
  // ones where the caller has not. Error{invalid_argument} where two adapters have some.
  std::vector<std::int32_t> soft_prompt(const AdapterMix& mix) const;
  // Of a sequence: with the tokens that its adapters bring.
  int vocab_size(const KvSequence& sequence) const noexcept;
  // Gives adapters' scratch back if no sequence needs it.
  void trim_adapters();
  // A sequence whose tokens are computed with these adapters, of this model; Error{invalid_argument} for
  // others and for scales that are not finite, Error{budget} where their scratch does not fit.
  // It begins with those tokens of `prompt` that are remembered (see KvSequence::begin_with): its length says
  // how many; the rest of the prompt is the caller's to run.
  std::shared_ptr<KvSequence> sequence(AdapterMix mix = {}, std::span<const std::int32_t> prompt = {});
  // Forgets the beginnings of texts that it remembers; to be called when weights change.
  void forget_prefixes() noexcept { kv_->forget(); }
  const KvPool& kv() const noexcept { return *kv_; }
  // Checksum of all that the state of a sequence depends on besides its tokens and adapters.
  std::uint64_t state_fingerprint() const;

  // The patches that a mix makes of the weights, for AdapterMix::patch. Error{invalid_argument} as
  // sequence(), Error{budget} where they do not fit.
  std::shared_ptr<PatchSet> patches(const AdapterMix& mix);
  // The same of an adapter that is stored, at scale 1. Where memory is short, not to `keep` what is read of
  // experts' patches takes little of it. Error{corrupt} where the file is damaged, also when it is used.
  std::shared_ptr<PatchSet> patches(const std::shared_ptr<const Adapter>& adapter, PatchFile file, bool keep);
  // Sequences of each set, or of none, get its weights when they run: what is to run next is made ready here,
  // the dense matrices at once and experts as they are used.
  void use(const std::shared_ptr<PatchSet>& set);
  // Takes a set's patches off, so that its memory is free once no sequence has it.
  void remove(const std::shared_ptr<PatchSet>& set);
  // Takes every patch off and checks what is resident against the bundle's checksums; how many tensors and
  // experts those were. Experts that are split are not checked. Error{corrupt} names what differs.
  std::size_t check_weights();

  // Runs the rows' tokens, in chunks where they are many. After an error every sequence stands as it was
  // before the step. `poll` is called every few milliseconds of work and may throw.
  void step(std::span<const StepRow> rows, const StepSink& sink, const std::function<void()>& poll);
  // A step that draws tokens; samplers accept theirs once the step is done. A bad row is refused before any
  // runs. `failed` is told of a row whose token cannot be drawn, and the others' stand; null: the step fails.
  using RowFailed = std::function<void(std::size_t row, std::exception_ptr error)>;
  std::vector<std::optional<Sample>> sample(std::span<const SampleRow> rows,
                                            const std::function<void()>& poll, const RowFailed& failed = {});

  // Stops the step under way, or the next one, with Error{cancelled}.
  void cancel() noexcept { cancelled_.store(true, std::memory_order_relaxed); }

  // See ImposedRouting; an empty table gives the choice back to the routers. Changes what the model computes:
  // it is there to measure how a routing pages.
  void impose_routing(const ImposedRouting::Table& table);
  // From the next step on. Error{invalid_argument} outside the knobs' ranges, and where moments are observed.
  void set_lossy(const LossyModes& modes);
  LossyModes lossy() const;

  // --- knobs that change while steps run; none changes a result ---
  // The runtime's budget, by way of this model's expert slots. Error{budget} names the least that works.
  void set_memory(std::uint64_t bytes);
  // Of expert slots: at most what all experts take. As ExpertStore::resize() otherwise.
  void set_expert_bytes(std::uint64_t bytes);
  std::uint64_t least_expert_bytes() const noexcept { return store_.least_bytes(); }
  // Adapters go before experts, which can be read again: takes so many bytes of the expert slots, as far as
  // the least are left; false where there is nothing to take. Waits for the step under way.
  bool take_from_experts(std::uint64_t bytes);
  // Gives back of what was taken what is free now, unless the slots' memory was set meanwhile, or somebody
  // else is in need of it: between seek_room(true) and seek_room(false) it is his.
  void return_to_experts();
  void seek_room(bool on) noexcept { seekers_ += on ? 1 : -1; }
  void set_prefetch_depth(int reads);
  int prefetch_depth() const { return store_.prefetch_depth(); }
  void set_token_interval_ms(double milliseconds);  // of steps in which every row decodes
  double token_interval_ms() const noexcept { return pace_.interval_ms(); }

  // How long the decode steps took that ended since the `since` first ones: seconds, and how many have ended.
  // Only the last kStepTimes are kept. A step with any row of one token is one.
  static constexpr std::size_t kStepTimes = 1024;
  std::pair<std::uint64_t, std::vector<float>> step_times(std::uint64_t since) const;

  // For measurements: reads ahead of need always or never; none: where that is found to pay.
  void force_preload(std::optional<bool> on);
  // The experts that the last step's last token used, by MoE layer.
  ImposedRouting::Table::value_type last_experts() const;

  // What was measured since loading; Error{invalid_argument} without ModelOptions::moments. No step runs
  // during the call, and what it is given dies with it.
  void observed(const std::function<void(const Observation&)>& use) const;

  ModelStatistics statistics() const;
  std::vector<std::vector<ExpertStore::Residency>> residency() const { return store_.residency(); }

 private:
  static std::span<const std::int32_t> first_tokens(const StepRow& row);
  void check(std::span<const StepRow> rows) const;
  void check(const AdapterMix& mix) const;
  std::size_t added_tokens(const AdapterMix& mix) const;
  void decide_sharing() noexcept;
  // With the step mutex held:
  bool take(std::uint64_t bytes);  // as take_from_experts()
  void reserve(const std::shared_ptr<const AdapterMix>& mix);
  std::vector<KvSequence::Hold> hold(std::span<const StepRow> rows) const;
  void run(std::span<const StepRow> rows, const StepSink& sink, const StepControl& control);
  // Of those rows whose weights these are.
  void run_chunks(std::span<const StepRow> rows, const std::shared_ptr<PatchSet>& set, const StepSink& sink,
                  const StepControl& control);
  void run_batch(std::span<const StepRow> rows, const StepSink& sink, const StepControl& control);
  struct Origin {
    std::size_t row, token;
  };

  const std::shared_ptr<Runtime> runtime_;
  const Bundle bundle_;
  const Recipe recipe_;
  const MemoryPlan plan_;
  const Eviction eviction_;
  const Weights weights_;
  const std::shared_ptr<KvPool> kv_;
  PatchedWeights patched_;
  ExpertStore store_;
  ExpertPrediction prediction_;
  Decoder decoder_;
  std::unique_ptr<Observation> observation_;  // or null
  Buffer sampling_;                           // the samplers' working space
  Buffer wide_sampling_;                      // likewise, of sequences that have more tokens

  mutable FairMutex step_mutex_;
  std::atomic<bool> cancelled_{false};
  std::mutex taken_mutex_;         // locked after step_mutex_
  std::uint64_t taken_bytes_ = 0;  // of the expert slots, by adapters
  std::atomic<int> seekers_ = 0;
  std::uint64_t capacity_left_ = 0;  // of the expert slots, when that was last so
  bool imposed_ = false;             // the choice of experts
  std::atomic<bool> fill_;           // the step to come has the rest of the experts read
  std::vector<BatchRow> batch_;      // of the chunk under way
  std::vector<Origin> origins_;      // where each came from
  mutable std::mutex statistics_mutex_;
  ModelStatistics statistics_;
  std::vector<float> step_times_;  // of decode steps, in a ring
  std::uint64_t decode_steps_ = 0;
  Pace pace_;
};

}  // namespace edgert
