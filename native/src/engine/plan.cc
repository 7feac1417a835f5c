// How a budget is divided among dense weights, KV cache, scratch and expert slots.
#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>

#include "control/knobs.h"
#include "engine/model.h"
#include "platform/error.h"

namespace edgert {
namespace {

constexpr int kChunks[] = {8, 16, 32, 64, 128, 256, 512, 1024};
constexpr int kResidentChunk = 512;  // where nothing is read for it, a longer one gains nothing
constexpr std::uint64_t kScratchShare =
    4;  // a chosen chunk's scratch takes at most a quarter of what is left
// The request that a chosen chunk suits.
constexpr int kPromptTokens = 1024;
constexpr int kAnswerTokens = 256;

std::int64_t checked_context(const Recipe& recipe, const ModelOptions& options) {
  const std::int64_t longest = recipe.context_length;
  if (options.context < 0 || options.context > longest) {
    throw Error(ErrorKind::invalid_argument, "context: found " + std::to_string(options.context) +
                                                 ", this model allows 1 to " + std::to_string(longest) +
                                                 " tokens (0: the default)");
  }
  return options.context != 0 ? options.context : std::min(longest, Model::kDefaultContext);
}

struct ExpertSizes {
  std::uint64_t total = 0;
  std::uint64_t largest = 0;
  std::uint64_t token = 0;
  std::vector<int> by_layer;  // how many
};

std::vector<std::vector<std::uint64_t>> extent_bytes(const Manifest& manifest) {
  std::vector<std::vector<std::uint64_t>> bytes;
  for (const auto& layer : manifest.experts) {
    bytes.emplace_back();
    for (const ExpertEntry& expert : layer.experts) bytes.back().push_back(expert.extent.bytes);
  }
  return bytes;
}

ExpertSizes expert_sizes(const WeightSizes& weights, const Recipe& recipe) {
  ExpertSizes sizes;
  std::size_t next = 0;
  for (int i = 0; i < recipe.num_layers(); ++i) {
    const FfnRecipe& ffn = recipe.block(i).ffn;
    if (!ffn.is_moe()) continue;
    if (next == weights.expert_bytes.size() ||
        weights.expert_bytes[next].size() != static_cast<std::size_t>(ffn.num_experts)) {
      throw Error(ErrorKind::invalid_argument, weights.name + ": layer " + std::to_string(i) + " needs " +
                                                   std::to_string(ffn.num_experts) + " sizes of experts");
    }
    std::uint64_t largest = 0;
    for (const std::uint64_t extent : weights.expert_bytes[next]) {
      const std::uint64_t bytes = ExpertStore::slot_bytes({.extent = {.bytes = extent}});
      sizes.total += bytes;
      largest = std::max(largest, bytes);
    }
    sizes.by_layer.push_back(ffn.num_experts);
    ++next;
    sizes.largest = std::max(sizes.largest, largest);
    sizes.token += largest * static_cast<std::uint64_t>(ffn.num_experts_per_tok);
  }
  return sizes;
}

// What such a request reads with `slots_bytes` of experts in memory, if every expert is as likely as any
// other: the prompt all of them once a chunk, a token of the answer its own as far as they are absent.
double bytes_read(const ExpertSizes& experts, int prompt_tokens, int chunk, std::uint64_t slots_bytes) {
  const auto total = static_cast<double>(experts.total);
  const double absent = 1 - std::min(1.0, static_cast<double>(slots_bytes) / total);
  const int chunks = (prompt_tokens + chunk - 1) / chunk;
  return chunks * total + kAnswerTokens * absent * static_cast<double>(experts.token);
}

// The longest chunk that leaves every expert in memory, else the one that reads least; 0: only the shortest
// fits.
int choose_chunk(const ExpertSizes& experts, const std::function<std::uint64_t(int)>& scratch,
                 std::uint64_t left, std::uint64_t two_slots, int longest) {
  int resident = 0;
  int paged = 0;
  double fewest = std::numeric_limits<double>::infinity();
  for (const int chunk : kChunks) {
    const std::uint64_t bytes = scratch(chunk);
    if (chunk > longest || bytes > left) break;
    if (chunk <= kResidentChunk && bytes + experts.total <= left) resident = chunk;
    if (bytes > left / kScratchShare || bytes + two_slots > left) continue;
    const double read = bytes_read(experts, std::min(kPromptTokens, longest), chunk, left - bytes);
    if (read < fewest) {
      fewest = read;
      paged = chunk;
    }
  }
  return resident != 0 ? resident : paged;
}

std::string megabytes(std::uint64_t bytes) {
  const std::uint64_t tenths = (((bytes + 1023) >> 10) * 10 + 1023) >> 10;
  return std::to_string(tenths / 10) + "." + std::to_string(tenths % 10) + " MiB";
}

}  // namespace

std::string key_projection(const Recipe& recipe) {
  for (int i = 0; i < recipe.num_layers(); ++i) {
    const MixerRecipe& mixer = recipe.block(i).mixer;
    const std::string prefix = "layers." + std::to_string(i) + ".attention.";
    if (std::holds_alternative<AttentionRecipe>(mixer)) return prefix + "k";
    if (std::holds_alternative<LatentAttentionRecipe>(mixer)) return prefix + "kv_a";
  }
  return {};
}

MemoryPlan plan_memory(const Bundle& bundle, const Recipe& recipe, const Runtime& runtime, int threads,
                       const ModelOptions& options) {
  const std::string key = key_projection(recipe);
  const WeightSizes sizes{.name = bundle.path().string(),
                          .dense_bytes = Weights::resident_bytes(bundle, recipe),
                          .key_format = key.empty() ? FormatId::f32 : bundle.tensor(key).format,
                          .expert_bytes = extent_bytes(bundle.manifest()),
                          .join_bytes = ExpertStore::join_bytes(bundle.manifest()),
                          .profile_bytes = RoutingProfile::charged_bytes(bundle.manifest())};
  return plan_memory(sizes, recipe, runtime, threads, options);
}

MemoryPlan plan_memory(const WeightSizes& weights, const Recipe& recipe, const Runtime& runtime, int threads,
                       const ModelOptions& options) {
  check_knob("parallel", options.parallel);
  check_knob("chunk", options.chunk);
  MemoryPlan plan;
  plan.context = checked_context(recipe, options);
  plan.kv_type = options.kv_type.value_or(weights.key_format == FormatId::f32 ? KvType::f32 : KvType::f16);
  const auto pages = [](std::uint64_t bytes) { return round_up(bytes, page_size()); };
  plan.dense_bytes = weights.dense_bytes;
  const KvPool::Shape pool{plan.context, options.parallel};
  plan.kv_bytes = pages(KvPool::kv_bytes(KvLayout(recipe, plan.kv_type), pool));
  plan.state_bytes = pages(KvPool::state_bytes(StateLayout(recipe), pool));
  plan.sampler_bytes = pages(Sampler::space_bytes(recipe.vocab_size));
  if (options.moments != MomentsKind::none)
    plan.observation_bytes = Observation::sums_bytes(recipe, options.moments);
  const ExpertSizes experts = expert_sizes(weights, recipe);
  plan.expert_bytes = experts.total;
  plan.token_bytes = experts.token;

  const std::uint64_t limit = runtime.budget()->limit_bytes();
  const std::uint64_t fixed =
      runtime.budget()->used_bytes() + plan.dense_bytes + plan.kv_bytes + plan.state_bytes +
      plan.sampler_bytes + plan.observation_bytes + weights.join_bytes +
      ExpertStore::index_bytes(options.eviction, experts.by_layer) +
      prediction_bytes(options.prefetch, recipe, weights.profile_bytes) + options.adapter_bytes;
  const int count = std::reduce(experts.by_layer.begin(), experts.by_layer.end());
  const std::uint64_t two_slots = static_cast<std::uint64_t>(std::min(2, count)) * experts.largest;
  const auto scratch = [&](int chunk) {
    const std::uint64_t rows =
        pages(Scratch::layout(recipe, {chunk, threads, plan.context, plan.kv_type}, nullptr).bytes);
    if (options.moments == MomentsKind::none) return rows;
    return rows + Observation::scratch_bytes(recipe, options.moments, chunk, threads);
  };
  const auto longest =
      static_cast<int>(std::min<std::int64_t>(plan.context * options.parallel, knob("chunk").maximum));
  plan.chunk = std::min(options.chunk != 0 ? options.chunk : kChunks[0], longest);
  plan.minimum_bytes = fixed + scratch(plan.chunk) + two_slots;
  plan.resident_bytes = fixed + scratch(plan.chunk) + experts.total;
  if (plan.minimum_bytes > limit) {
    throw Error(
        ErrorKind::budget,
        "memory: a budget of " + std::to_string(limit) + " bytes (" + megabytes(limit) +
            ") is too small for " + weights.name + "; the smallest that works is " +
            std::to_string(plan.minimum_bytes) + " bytes (" + megabytes(plan.minimum_bytes) +
            "): dense weights " + megabytes(plan.dense_bytes) + ", KV cache of " +
            std::to_string(plan.context) + " tokens x " + std::to_string(options.parallel) + " " +
            megabytes(plan.kv_bytes + plan.state_bytes) + ", two expert slots " + megabytes(two_slots) +
            (plan.observation_bytes == 0 ? std::string()
                                         : ", sums of the calibration " + megabytes(plan.observation_bytes) +
                                               " (diagonals alone take less)") +
            (options.adapter_bytes == 0 ? std::string()
                                        : ", kept for adapters " + megabytes(options.adapter_bytes)) +
            ", the rest scratch, tokenizer and the list of experts; a smaller context needs less");
  }
  if (options.chunk == 0) {
    const int chosen = choose_chunk(experts, scratch, limit - fixed, two_slots, longest);
    if (chosen != 0) plan.chunk = chosen;
  }
  plan.scratch_bytes = scratch(plan.chunk);
  plan.slots_bytes = std::min(limit - fixed - plan.scratch_bytes, experts.total);
  if (options.expert_bytes != 0)
    plan.slots_bytes = std::min(plan.slots_bytes, std::max(options.expert_bytes, two_slots));
  return plan;
}

}  // namespace edgert
