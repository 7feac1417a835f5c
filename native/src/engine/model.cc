#include "engine/model.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <utility>

#include "bundle/xxhash.h"
#include "control/knobs.h"
#include "model/split_expert.h"
#include "platform/error.h"

namespace edgert {
namespace {

using Clock = std::chrono::steady_clock;

// The recipe and the bundle outlive it.
ExpertStore::Join join_of(const Recipe& recipe, const Bundle& bundle) {
  return [&](int layer, std::uint32_t formats, std::span<const std::byte> base,
             std::span<const std::byte> refinement, std::span<std::byte> slot) {
    const auto hidden = static_cast<std::size_t>(recipe.hidden_size);
    const FfnRecipe& ffn = recipe.block(layer).ffn;
    const SplitLayout layout = split_layout(bundle.manifest().expert_formats[formats], hidden, ffn);
    join_expert(layout, hidden, ffn, base, refinement, slot);
    return layout.whole.bytes;
  };
}

// Says what to do where adapters do not fit.
auto with_hint(const auto& make) {
  try {
    return make();
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::budget) throw;
    throw Error(ErrorKind::budget,
                std::string(error.what()) + "; the knob adapter_memory keeps memory for adapters");
  }
}

}  // namespace

Model::Model(std::shared_ptr<Runtime> runtime, const std::filesystem::path& path, const ModelOptions& options,
             const std::function<void()>& poll)
    : runtime_(std::move(runtime)),
      bundle_(Bundle::open(path, runtime_->direct_io())),
      recipe_(recipe_of(bundle_)),
      plan_(plan_memory(bundle_, recipe_, *runtime_, runtime_->pool().threads(), options)),
      eviction_(options.eviction),
      weights_(bundle_, recipe_, runtime_->budget(), runtime_->reader(), poll),
      kv_(std::make_shared<KvPool>(recipe_, plan_.kv_type, KvPool::Shape{plan_.context, options.parallel},
                                   runtime_->budget())),
      patched_(bundle_, recipe_, weights_, store_, runtime_->pool()),
      store_(bundle_, runtime_->budget(), runtime_->reader(), plan_.slots_bytes, eviction_,
             join_of(recipe_, bundle_)),
      prediction_(plan_.resident() ? Prediction::none : options.prefetch, bundle_, recipe_, weights_, store_,
                  runtime_->pool(), runtime_->kernel_table(), runtime_->budget()),
      decoder_(bundle_, recipe_, weights_, store_, *kv_, {runtime_->pool(), runtime_->kernel_table()},
               runtime_->budget(), {plan_.chunk, runtime_->pool().threads(), plan_.context, plan_.kv_type}),
      sampling_(runtime_->budget(), Sampler::space_bytes(recipe_.vocab_size), "sampling"),
      fill_(plan_.resident()),
      step_times_(kStepTimes) {
  if (options.moments != MomentsKind::none) {
    observation_ = std::make_unique<Observation>(recipe_, options.moments,
                                                 Machine{runtime_->pool(), runtime_->kernel_table()},
                                                 runtime_->budget(), plan_.chunk);
    decoder_.observe(observation_.get());
  }
  store_.set_page_in_hook([this](const ExpertStore::Expert& expert, std::span<std::byte> bytes) {
    return patched_.page_in(expert, bytes);
  });
  decoder_.patch(&patched_);
  set_lossy(options.lossy);
  batch_.reserve(static_cast<std::size_t>(plan_.chunk));
  origins_.reserve(static_cast<std::size_t>(plan_.chunk));
  decoder_.look_ahead(prediction_.preloader());
}

std::shared_ptr<const Adapter> Model::adapter(const std::string& name, std::span<const AdapterSource> sources,
                                              std::uint64_t order, std::size_t added_tokens) const {
  return with_hint([&] {
    return std::make_shared<const Adapter>(weights_.targets(), sources, runtime_->budget(), name, order,
                                           added_tokens);
  });
}

std::shared_ptr<const Adapter> Model::stored_adapter(const std::string& name, std::uint64_t order,
                                                     std::uint64_t fingerprint) const {
  return with_hint([&] {
    return std::make_shared<const Adapter>(weights_.targets(), fingerprint, runtime_->budget(), name, order);
  });
}

Targets::Shape Model::target(std::string_view name) const {
  const Targets& targets = *weights_.targets();
  return targets.shape(targets.find(name));
}

void Model::trim_adapters() {
  const std::lock_guard lock(step_mutex_);
  if (decoder_.trim()) wide_sampling_ = Buffer();
}

// Tokens past the vocabulary that an adapter gives rows of the embedding.
std::vector<std::int32_t> Model::soft_prompt(const AdapterMix& mix) const {
  std::vector<std::int32_t> tokens;
  for (const auto& [adapter, scale] : mix.entries) {
    const Adapter::Part* part = adapter->part(weights_.embedding().target);
    if (scale == 0 || part == nullptr || part->weight_rows == nullptr) continue;
    const std::span rows(part->weight_rows, part->weight_count);
    const auto first = std::lower_bound(rows.begin(), rows.end(), static_cast<std::int32_t>(part->rows));
    if (first != rows.end() && !tokens.empty())
      throw Error(
          ErrorKind::invalid_argument,
          "adapter " + adapter->name() +
              ": its soft prompt would follow another adapter's; one of a sequence's adapters may have one");
    if (first != rows.end() && adapter->added_tokens() != added_tokens(mix))
      throw Error(ErrorKind::invalid_argument,
                  "adapter " + adapter->name() +
                      ": its soft prompt and the tokens that another adapter brings do not run together");
    tokens.insert(tokens.end(), first, rows.end());
  }
  return tokens;
}

// Those behind the vocabulary that a sequence's adapters bring: all that bring any bring as many.
std::size_t Model::added_tokens(const AdapterMix& mix) const {
  const Adapter* brings = nullptr;
  for (const auto& [adapter, scale] : mix.entries) {
    if (scale == 0 || adapter->added_tokens() == 0) continue;
    if (brings != nullptr && brings->added_tokens() != adapter->added_tokens()) {
      const auto says = [](const Adapter& one) {
        return one.name() + " brings " + std::to_string(one.added_tokens());
      };
      throw Error(ErrorKind::invalid_argument, "adapter " + says(*adapter) + " tokens and adapter " +
                                                   says(*brings) +
                                                   ": those of a sequence must bring equally many");
    }
    brings = adapter.get();
  }
  return brings == nullptr ? 0 : brings->added_tokens();
}

int Model::vocab_size(const KvSequence& sequence) const noexcept {
  const AdapterMix* mix = sequence.mix();
  return recipe_.vocab_size + (mix == nullptr ? 0 : static_cast<int>(mix->added_tokens));
}

std::shared_ptr<KvSequence> Model::sequence(AdapterMix mix, std::span<const std::int32_t> prompt) {
  check(mix);
  std::shared_ptr<const AdapterMix> shared;
  std::uint64_t root = 0;
  if (!mix.entries.empty()) {
    std::sort(mix.entries.begin(), mix.entries.end(),
              [](const auto& a, const auto& b) { return a.adapter->order() < b.adapter->order(); });
    mix.added_tokens = added_tokens(mix);
    mix.soft_prompt = soft_prompt(mix);
    root = mix.fingerprint();
    const std::lock_guard lock(step_mutex_);
    shared = std::make_shared<const AdapterMix>(std::move(mix));
    with_hint([&] { reserve(shared); });
  }
  auto sequence = std::make_shared<KvSequence>(kv_, std::move(shared), root);
  sequence->begin_with(prompt);
  return sequence;
}

std::uint64_t Model::state_fingerprint() const {
  Xxh64 hash;
  const auto add = [&](std::uint64_t value) { hash.update(std::as_bytes(std::span(&value, 1))); };
  hash.update(std::as_bytes(std::span(bundle_.manifest().bundle_id)));
  add(static_cast<std::uint64_t>(plan_.kv_type));
  add(kv_->layout().block_bytes);
  add(kv_->state_layout().floats);
  for (int i = 0; i < recipe_.num_layers(); ++i) {
    const MixerRecipe& mixer = recipe_.block(i).mixer;
    const RopeRecipe* rope = nullptr;
    if (const auto* a = std::get_if<AttentionRecipe>(&mixer); a != nullptr && a->rope) rope = &*a->rope;
    if (const auto* latent = std::get_if<LatentAttentionRecipe>(&mixer)) rope = &latent->rope;
    if (rope != nullptr && rope->long_context)
      add(plan_.context > rope->long_context->beyond);  // other angles
  }
  return hash.digest();
}

void Model::check(const AdapterMix& mix) const {
  for (std::size_t i = 0; i < mix.entries.size(); ++i) {
    const auto& [adapter, scale] = mix.entries[i];
    const std::string name = "adapter " + adapter->name() + ": ";
    if (!adapter->belongs_to(weights_.targets()))
      throw Error(ErrorKind::invalid_argument, name + "was made for another model");
    if (!std::isfinite(scale)) throw Error(ErrorKind::invalid_argument, name + "its scale is not finite");
    if (mix.top_k != 0 && !adapter->ungated().empty())
      throw Error(ErrorKind::invalid_argument,
                  name + adapter->ungated() + " has no gate, which a gated mixture needs");
    if (mix.top_k != 0 && adapter->added_tokens() != 0)
      throw Error(ErrorKind::invalid_argument, name + "it brings tokens, which a gated mixture cannot");
    for (std::size_t j = 0; j < i; ++j) {
      if (mix.entries[j].adapter == adapter)
        throw Error(ErrorKind::invalid_argument, name + "stands twice in the mix");
    }
  }
  if (mix.top_k != 0 && mix.patch != nullptr)
    throw Error(ErrorKind::invalid_argument, "adapters: patches are not gated");
  if (mix.patch != nullptr && !mix.patch->is_of(mix.entries))
    throw Error(ErrorKind::invalid_argument, "adapters: the patches are those of others, or of other scales");
}

std::shared_ptr<PatchSet> Model::patches(const AdapterMix& mix) {
  check(mix);
  return with_hint([&] { return patched_.make(mix, runtime_->budget()); });
}

std::shared_ptr<PatchSet> Model::patches(const std::shared_ptr<const Adapter>& adapter, PatchFile file,
                                         bool keep) {
  const AdapterMix mix{{{adapter, 1}}};
  check(mix);
  return with_hint([&] { return patched_.stored(mix, std::move(file), keep, runtime_->budget()); });
}

void Model::use(const std::shared_ptr<PatchSet>& set) {
  const std::lock_guard lock(step_mutex_);
  patched_.use(set);
}

void Model::remove(const std::shared_ptr<PatchSet>& set) {
  const std::lock_guard lock(step_mutex_);
  patched_.remove(set);
}

std::size_t Model::check_weights() {
  const std::lock_guard lock(step_mutex_);
  return patched_.check();
}

void Model::check(std::span<const StepRow> rows) const {
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const std::string row = "row " + std::to_string(i) + ": ";
    if (rows[i].tokens.empty()) throw Error(ErrorKind::invalid_argument, row + "no tokens");
    for (std::size_t t = 0; t < rows[i].tokens.size(); ++t) {
      const std::int32_t token = rows[i].tokens[t];
      const AdapterMix* mix = rows[i].sequence->mix();
      const bool soft =
          mix != nullptr && std::binary_search(mix->soft_prompt.begin(), mix->soft_prompt.end(), token);
      if (token < 0 || (token >= vocab_size(*rows[i].sequence) && !soft)) {
        throw Error(ErrorKind::invalid_argument, row + "token " + std::to_string(t) + " is " +
                                                     std::to_string(token) + ", allowed 0 to " +
                                                     std::to_string(vocab_size(*rows[i].sequence) - 1));
      }
    }
    if (!rows[i].sequence->belongs_to(*kv_))
      throw Error(ErrorKind::invalid_argument, row + "its sequence belongs to another model");
  }
}

std::vector<KvSequence::Hold> Model::hold(std::span<const StepRow> rows) const {
  std::vector<KvSequence::Hold> holds;
  holds.reserve(rows.size());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (!holds.emplace_back(*rows[i].sequence)) {
      throw Error(ErrorKind::invalid_argument,
                  "row " + std::to_string(i) + ": its sequence is in use, or stands in the batch twice");
    }
  }
  return holds;
}

void Model::step(std::span<const StepRow> rows, const StepSink& sink, const std::function<void()>& poll) {
  if (std::ranges::all_of(rows, [](const StepRow& row) { return row.tokens.size() == 1; }))
    pace_.wait(cancelled_, poll);
  const std::lock_guard lock(step_mutex_);
  check(rows);
  const std::vector<KvSequence::Hold> holds = hold(rows);
  std::vector<std::int64_t> lengths;
  for (const StepRow& row : rows) lengths.push_back(row.sequence->length());
  try {
    for (const StepRow& row : rows)
      row.sequence->reserve(row.sequence->length() +
                            static_cast<std::int64_t>(first_tokens(row).size() + row.tokens.size()));
    run(rows, sink, {cancelled_, poll});
    for (const StepRow& row : rows) row.sequence->settle();
  } catch (...) {
    store_.cancel_prefetch();
    for (std::size_t i = 0; i < rows.size(); ++i) rows[i].sequence->restore(lengths[i]);
    cancelled_.store(false, std::memory_order_relaxed);
    throw;
  }
  if (fill_.exchange(false)) store_.fill();
}

std::vector<std::optional<Sample>> Model::sample(std::span<const SampleRow> rows,
                                                 const std::function<void()>& poll, const RowFailed& failed) {
  std::vector<StepRow> spans;
  std::vector<std::int64_t> ends;
  for (const SampleRow& row : rows) {
    if (row.sampler != nullptr)
      row.sampler->check(vocab_size(*row.sequence), "row " + std::to_string(spans.size()));
    spans.push_back({row.sequence, row.tokens, row.sampler != nullptr ? Wanted::last : Wanted::none});
    ends.push_back(row.sequence->length() +
                   static_cast<std::int64_t>(first_tokens(spans.back()).size() + row.tokens.size()));
  }
  std::vector<std::optional<Sample>> samples(rows.size());
  step(
      spans,
      [&](std::size_t row, std::size_t, std::span<float> logits) {
        try {
          const SampleRow& asked = rows[row];
          if (asked.ready) {
            if (!asked.ready()) return;
            asked.sampler->check(vocab_size(*asked.sequence),
                                 "row " + std::to_string(row));  // what it may be told by then
          }
          const bool wide = vocab_size(*asked.sequence) > recipe_.vocab_size;
          const std::span space((wide ? wide_sampling_ : sampling_).as<Candidate>(), logits.size());
          samples[row] = asked.sampler->sample(logits, ends[row], space);
        } catch (...) {
          if (!failed) throw;
          failed(row, std::current_exception());
        }
      },
      poll);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (samples[i]) rows[i].sampler->accept(std::span(&samples[i]->token, 1));
  }
  return samples;
}

// The soft prompt of a sequence that begins, unless its tokens begin with it.
std::span<const std::int32_t> Model::first_tokens(const StepRow& row) {
  if (row.tokens.empty() || row.sequence->length() > 0 || row.sequence->mix() == nullptr) return {};
  const std::span<const std::int32_t> prompt = row.sequence->mix()->soft_prompt;
  return !prompt.empty() && row.tokens[0] == prompt[0] ? std::span<const std::int32_t>() : prompt;
}

// Rows of one set of patches after those of another; first those whose weights are there.
void Model::run(std::span<const StepRow> rows, const StepSink& sink, const StepControl& control) {
  const auto set_of = [](const StepRow& row) {
    return row.sequence->mix() == nullptr ? nullptr : row.sequence->mix()->patch;
  };
  std::vector<std::shared_ptr<PatchSet>> sets;
  for (const StepRow& row : rows) {
    auto set = set_of(row);
    if (std::find(sets.begin(), sets.end(), set) == sets.end()) sets.push_back(std::move(set));
  }
  const auto there = std::find(sets.begin(), sets.end(), patched_.current());
  if (there != sets.end()) std::iter_swap(sets.begin(), there);
  for (const auto& set : sets) {
    patched_.use(set);
    run_chunks(rows, set, sink, control);
  }
}

void Model::run_chunks(std::span<const StepRow> rows, const std::shared_ptr<PatchSet>& set,
                       const StepSink& sink, const StepControl& control) {
  batch_.clear();
  origins_.clear();
  for (std::size_t r = 0; r < rows.size(); ++r) {
    const StepRow& row = rows[r];
    if ((row.sequence->mix() == nullptr ? nullptr : row.sequence->mix()->patch) != set) continue;
    const auto add = [&](std::int64_t position, std::int32_t token, bool wanted, Origin origin) {
      batch_.push_back({row.sequence, position, token, wanted});
      origins_.push_back(origin);
      if (batch_.size() == static_cast<std::size_t>(plan_.chunk)) run_batch(rows, sink, control);
    };
    const std::int64_t start = row.sequence->length();
    for (std::int64_t at = row.sequence->computed(); at < start; ++at)
      add(at, row.sequence->token(at), false, {r, 0});
    std::int64_t at = start;
    const auto put = [&](std::int32_t token, bool wanted, Origin origin) {
      row.sequence->token(at) = token;
      add(at++, token, wanted, origin);
    };
    for (const std::int32_t token : first_tokens(row)) put(token, false, {r, 0});
    for (std::size_t t = 0; t < row.tokens.size(); ++t) {
      const bool last = t + 1 == row.tokens.size();
      put(row.tokens[t], row.wanted == Wanted::all || (row.wanted == Wanted::last && last), {r, t});
    }
  }
  if (!batch_.empty()) run_batch(rows, sink, control);
}

void Model::run_batch(std::span<const StepRow> rows, const StepSink& sink, const StepControl& control) {
  const auto start = Clock::now();
  decoder_.run(batch_, control, [&](std::size_t i, std::span<float> logits) {
    sink(origins_[i].row, origins_[i].token, logits);
  });
  for (const BatchRow& row : batch_) row.sequence->advance();
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  const bool decode = std::all_of(origins_.begin(), origins_.end(),
                                  [&](const Origin& o) { return rows[o.row].tokens.size() == 1; });
  {
    const std::lock_guard lock(statistics_mutex_);
    (decode ? statistics_.decode_tokens : statistics_.prefill_tokens) += batch_.size();
    (decode ? statistics_.decode_s : statistics_.prefill_s) += seconds;
    if (std::ranges::any_of(rows, [](const StepRow& row) { return row.tokens.size() == 1; }))
      step_times_[decode_steps_++ % kStepTimes] = static_cast<float>(seconds);
  }
  batch_.clear();
  origins_.clear();
}

void Model::impose_routing(const ImposedRouting::Table& table) {
  auto routing = table.empty() ? nullptr : std::make_shared<const ImposedRouting>(recipe_, table);
  const std::lock_guard lock(step_mutex_);
  imposed_ = routing != nullptr;
  decoder_.impose_routing(std::move(routing));
  decide_sharing();
}

// Tokens are remembered where what they compute is their own.
void Model::decide_sharing() noexcept {
  const LossyModes& modes = decoder_.lossy();
  const bool lossy =
      std::ranges::any_of(kLossyModes, [&](const LossyMode& mode) { return modes.*mode.share > 0; });
  kv_->share(!lossy && !imposed_ && !observation_);
}

void Model::set_lossy(const LossyModes& modes) {
  for (const LossyMode& mode : kLossyModes) {
    check_number(mode.knob, modes.*mode.share);
    if (observation_ && modes.*mode.share > 0)
      throw Error(ErrorKind::invalid_argument,
                  std::string(mode.knob) + ": a model that is measured computes exactly");
  }
  const std::lock_guard lock(step_mutex_);
  decoder_.set_lossy(modes);
  decide_sharing();
}

LossyModes Model::lossy() const {
  const std::lock_guard lock(step_mutex_);
  return decoder_.lossy();
}

void Model::set_prefetch_depth(int reads) {
  check_knob("prefetch_depth", reads);
  store_.set_prefetch_depth(reads);
}

void Model::set_token_interval_ms(double milliseconds) {
  check_number("token_interval_ms", milliseconds);
  pace_.set_interval_ms(milliseconds);
}

std::pair<std::uint64_t, std::vector<float>> Model::step_times(std::uint64_t since) const {
  const std::lock_guard lock(statistics_mutex_);
  const std::uint64_t kept = std::min<std::uint64_t>(decode_steps_, kStepTimes);
  std::vector<float> times;
  for (std::uint64_t i = std::max(since, decode_steps_ - kept); i < decode_steps_; ++i)
    times.push_back(step_times_[i % kStepTimes]);
  return {decode_steps_, std::move(times)};
}

void Model::force_preload(std::optional<bool> on) {
  if (Preloader* preloader = prediction_.preloader()) preloader->force(on);
}

ImposedRouting::Table::value_type Model::last_experts() const {
  const std::lock_guard lock(step_mutex_);
  ImposedRouting::Table::value_type layers;
  for (int layer = 0; layer < recipe_.num_layers(); ++layer) {
    if (!recipe_.block(layer).ffn.is_moe()) continue;
    const auto experts = decoder_.last_experts(layer);
    auto& used = layers.emplace_back(experts.begin(), experts.end());
    std::erase(used, kNoExpert);
  }
  return layers;
}

void Model::observed(const std::function<void(const Observation&)>& use) const {
  if (!observation_)
    throw Error(ErrorKind::invalid_argument,
                "moments: the model was loaded with none, so nothing is measured");
  const std::lock_guard lock(step_mutex_);
  use(*observation_);
}

ModelStatistics Model::statistics() const {
  ModelStatistics out;
  {
    const std::lock_guard lock(statistics_mutex_);
    out = statistics_;
  }
  out.experts = store_.statistics();
  out.lossy = decoder_.lossy_counts();
  if (const Preloader* preloader = prediction_.preloader()) out.preload = preloader->statistics();
  out.patch_bytes_read = patched_.bytes_read();
  out.bytes_read =
      weights_.bytes_read() + out.experts.demand_bytes + out.experts.prefetched_bytes + out.patch_bytes_read;
  return out;
}

}  // namespace edgert
