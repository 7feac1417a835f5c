#include "control/knobs.h"

#include <limits>
#include <string>

#include "experts/eviction.h"
#include "experts/predictor.h"
#include "platform/error.h"

namespace edgert {
namespace {

using Words = std::string_view[];

constexpr Words kAuto = {"auto"};
constexpr Words kKvFormats = {"auto", "f32", "f16", "int8"};
constexpr Words kIoBackends = {"auto", "pread", "io_uring"};
constexpr Words kDirectIo = {"auto", "on", "off"};
constexpr Words kIsas = {"auto", "scalar", "portable", "avx2", "avxvnni", "avx512", "neon", "neon-i8mm"};
constexpr auto kMaxBytes = std::numeric_limits<std::int64_t>::max();
constexpr std::int64_t kMaxContext = std::numeric_limits<std::int32_t>::max();

constexpr Knob kKnobs[] = {
    {"memory", KnobKind::bytes, "auto", 1, kMaxBytes, kAuto, "bytes", true,
     "Bound on all memory of the engine: weights, expert slots, KV cache, scratch. auto: what the machine "
     "and its "
     "cgroup have free, less a margin."},
    {"threads", KnobKind::integer, "auto", 1, 1024, kAuto, "threads", true,
     "Threads that compute. auto: the cores that this process may use. While a model runs: at most those."},
    {"expert_memory", KnobKind::bytes, "auto", 1, kMaxBytes, kAuto, "bytes", true,
     "Memory for expert slots, at most. auto: what `memory` leaves."},
    {"context", KnobKind::integer, "auto", 1, kMaxContext, kAuto, "tokens", false,
     "Longest sequence, prompt and answer together. auto: the model's own, at most 8192."},
    {"parallel",
     KnobKind::integer,
     1,
     1,
     1024,
     {},
     "sequences",
     false,
     "Sequences of full context that the KV cache holds at once."},
    {"chunk", KnobKind::integer, "auto", 1, 8192, kAuto, "tokens", false,
     "Tokens of a prefill step: more read each expert less often and take more scratch memory. auto: what "
     "reads "
     "least for a prompt of 1024 tokens and an answer of 256; 512 where every expert stays in memory."},
    {"kv_format", KnobKind::choice, "auto", 0, 0, kKvFormats, "", false,
     "Number format of the KV cache. auto: f16, or f32 where attention is; int8 takes 0.55 of f16 and loses "
     "a "
     "little."},
    {"io_threads",
     KnobKind::integer,
     4,
     1,
     256,
     {},
     "threads",
     true,
     "Reads of experts from storage that are in flight at once; with pread, each takes a thread. While a "
     "model "
     "runs: at most those."},
    {"prefetch_depth",
     KnobKind::integer,
     2,
     0,
     64,
     {},
     "reads",
     true,
     "Reads of experts ahead of need that are in flight at once; 0: none. Changes no output."},
    {"token_interval_ms",
     KnobKind::number,
     0,
     0,
     60000,
     {},
     "ms",
     true,
     "Least time from one token to the next, to save power; 0: as fast as it goes."},
    {"io_backend", KnobKind::choice, "auto", 0, 0, kIoBackends, "", false,
     "How storage is read. auto: what `edgert devices probe` found faster; unmeasured, pread, "
     "which costs less of the processor at the same speed."},
    {"direct_io", KnobKind::choice, "auto", 0, 0, kDirectIo, "", false,
     "Reads past the page cache (O_DIRECT). auto: what `edgert devices probe` found faster; unmeasured, "
     "where the "
     "file system takes them."},
    {"eviction", KnobKind::choice, kEvictions[0], 0, 0, kEvictions, "", false,
     "Which expert goes when another needs its memory: the least likely to be used next (forecast), the one "
     "used longest ago (lru) or least often (lfu), or as EdgeMoE has it (edgemoe). Changes no output."},
    {"cache_aware_routing",
     KnobKind::number,
     0,
     0,
     1,
     {},
     "of the spread of a row's router logits",
     true,
     "Lossy: a chosen expert that would have to be read gives way to one in memory whose logit is lower by "
     "at "
     "most this share of the spread; never the first choice. 0: off.",
     true},
    {"skip_experts",
     KnobKind::number,
     0,
     0,
     1,
     {},
     "of a row's expert weights",
     true,
     "Lossy: leaves out experts whose weight is below this share of the row's, never the largest. 0: off.",
     true},
    {"skip_absent_experts",
     KnobKind::number,
     0,
     0,
     1,
     {},
     "of a row's expert weights",
     true,
     "Lossy: the same for experts that would have to be read. 0: off.",
     true},
    {"low_precision_misses",
     KnobKind::number,
     0,
     0,
     1,
     {},
     "of a row's expert weights",
     true,
     "Lossy: of an expert that would have to be read and whose weight is below this share of the row's, only "
     "the "
     "base is read, in a bundle made with --split-experts. 0: off.",
     true},
    {"prefetch", KnobKind::choice, kPredictions[0], 0, 0, kPredictions, "", false,
     "What foretells the experts of the next layers, for eviction and for reading ahead where that is found "
     "to "
     "pay: the statistics of a calibration (dictionary), the next layers' own routers (router), or a map "
     "fitted "
     "during calibration (trained). auto: trained where the bundle has it, else router. Changes no output."},
    {"adapter_memory",
     KnobKind::bytes,
     0,
     0,
     kMaxBytes,
     {},
     "bytes",
     false,
     "Memory that is kept for adapters, and the most that idle ones take. Without it they take what the "
     "experts leave, and of their slots what those that are in use lack."},
    {"isa", KnobKind::choice, "auto", 0, 0, kIsas, "", false,
     "Instruction set of the kernels. auto: the best that this processor runs."},
};

}  // namespace

std::span<const Knob> knobs() noexcept { return kKnobs; }

std::string_view name(KnobKind kind) noexcept {
  switch (kind) {
    case KnobKind::bytes:
      return "bytes";
    case KnobKind::integer:
      return "int";
    case KnobKind::number:
      return "float";
    case KnobKind::choice:
      return "choice";
  }
  return "";
}

const Knob& knob(std::string_view name) {
  std::string known;
  for (const Knob& row : kKnobs) {
    if (row.name == name) return row;
    known.append(known.empty() ? "" : ", ").append(row.name);
  }
  throw Error(ErrorKind::invalid_argument, "knob " + std::string(name) + " is unknown; known are " + known);
}

void check_knob(std::string_view name, std::int64_t value) {
  const Knob& row = knob(name);
  const bool automatic = !row.choices.empty();
  if ((value >= row.minimum && value <= row.maximum) || (automatic && value == 0)) return;
  throw Error(ErrorKind::invalid_argument, std::string(name) + ": found " + std::to_string(value) +
                                               ", allowed " + std::to_string(row.minimum) + " to " +
                                               std::to_string(row.maximum) + (automatic ? " (0: auto)" : ""));
}

void check_number(std::string_view name, double value) {
  const Knob& row = knob(name);
  if (value >= static_cast<double>(row.minimum) && value <= static_cast<double>(row.maximum)) return;
  throw Error(ErrorKind::invalid_argument, std::string(name) + ": found " + std::to_string(value) +
                                               ", allowed " + std::to_string(row.minimum) + " to " +
                                               std::to_string(row.maximum));
}

}  // namespace edgert
