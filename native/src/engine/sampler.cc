#include "engine/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <string>

#include "platform/error.h"

namespace edgert {
namespace {

constexpr std::size_t kWordBits = 32;  // of a mask

void require(bool good, const char* field, double found, const char* allowed) {
  if (!good) {
    throw Error(ErrorKind::invalid_argument,
                std::string(field) + ": found " + std::to_string(found) + ", allowed " + allowed);
  }
}

// SplitMix64's finaliser: a bijection that spreads every input bit over the output.
std::uint64_t mix(std::uint64_t z) {
  z += 0x9E3779B97F4A7C15ULL;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ z >> 27) * 0x94D049BB133111EBULL;
  return z ^ z >> 31;
}

// Uniform in [0, 1) from the counter alone.
double uniform(std::uint64_t seed, std::uint64_t stream, std::uint64_t position) {
  const std::uint64_t bits = mix(mix(mix(seed) ^ stream) ^ position);
  return static_cast<double>(bits >> 11) * 0x1.0p-53;
}

// Larger logit first, then lower id: a total order, so results do not depend on the sort.
bool better(const Candidate& a, const Candidate& b) {
  return a.first > b.first || (a.first == b.first && a.second < b.second);
}

// Candidates from the best on, put in order as far as somebody looks: a draw seldom looks far.
class BestFirst {
 public:
  explicit BestFirst(std::span<Candidate> candidates) : candidates_(candidates) {}
  const Candidate& operator[](std::size_t place) {
    while (place >= ordered_) order_more();
    return candidates_[place];
  }

 private:
  void order_more() {
    const auto from = candidates_.begin() + static_cast<std::ptrdiff_t>(ordered_);
    const std::size_t end = std::min(candidates_.size(), std::max<std::size_t>(64, 8 * ordered_));
    const auto to = candidates_.begin() + static_cast<std::ptrdiff_t>(end);
    if (to != candidates_.end()) std::nth_element(from, to, candidates_.end(), better);
    std::sort(from, to, better);
    ordered_ = end;
  }

  std::span<Candidate> candidates_;
  std::size_t ordered_ = 0;
};

double log_sum_exp(std::span<const float> logits, float maximum) {
  double sum = 0;
  for (const float x : logits) {
    if (!std::isnan(x)) sum += std::exp(static_cast<double>(x) - static_cast<double>(maximum));
  }
  return std::log(sum) + static_cast<double>(maximum);
}

std::int32_t argmax(std::span<const float> logits) {
  std::size_t best = logits.size();
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if (!std::isnan(logits[i]) && (best == logits.size() || logits[i] > logits[best])) best = i;
  }
  if (best == logits.size() || std::isinf(logits[best])) {
    throw Error(ErrorKind::invalid_argument,
                "no token can be sampled: every logit is NaN or infinite; check the model and logit_bias");
  }
  return static_cast<std::int32_t>(best);
}

void report_logprobs(Sample& sample, std::span<const float> logits, int wanted, std::span<Candidate> space) {
  const float maximum = logits[static_cast<std::size_t>(argmax(logits))];
  const double normalizer = log_sum_exp(logits, maximum);
  std::size_t numbers = 0;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if (!std::isnan(logits[i])) space[numbers++] = {logits[i], static_cast<std::int32_t>(i)};
  }
  const std::span candidates = space.first(numbers);
  const std::span best = space.first(std::min(static_cast<std::size_t>(wanted), numbers));
  std::partial_sort(candidates.begin(), best.end(), candidates.end(), better);
  for (const auto& [logit, token] : best) {
    sample.top.emplace_back(token, static_cast<float>(static_cast<double>(logit) - normalizer));
  }
  sample.logprob = static_cast<float>(-normalizer);  // the caller adds the token's own logit
}

}  // namespace

Sampler::Sampler(SamplerOptions options, std::uint64_t stream)
    : options_(std::move(options)), stream_(stream) {
  const SamplerOptions& o = options_;
  const auto finite = [](float x) { return std::isfinite(x); };
  require(finite(o.temperature) && o.temperature >= 0 && o.temperature <= 100, "temperature",
          static_cast<double>(o.temperature), "0 to 100");
  require(o.top_k >= 0, "top_k", o.top_k, "0 (off) or more");
  require(o.top_p > 0 && o.top_p <= 1, "top_p", static_cast<double>(o.top_p), "above 0, at most 1");
  require(o.min_p >= 0 && o.min_p <= 1, "min_p", static_cast<double>(o.min_p), "0 to 1");
  require(finite(o.repetition_penalty) && o.repetition_penalty > 0 && o.repetition_penalty <= 100,
          "repetition_penalty", static_cast<double>(o.repetition_penalty), "above 0, at most 100");
  require(finite(o.presence_penalty) && std::fabs(o.presence_penalty) <= 100, "presence_penalty",
          static_cast<double>(o.presence_penalty), "-100 to 100");
  require(finite(o.frequency_penalty) && std::fabs(o.frequency_penalty) <= 100, "frequency_penalty",
          static_cast<double>(o.frequency_penalty), "-100 to 100");
  require(o.penalty_window >= -1, "penalty_window", o.penalty_window, "-1 (all) or more");
  require(o.logprobs >= -1 && o.logprobs <= kMaxLogprobs, "logprobs", o.logprobs, "-1 (none) to 100");
  for (const auto& [token, bias] : o.logit_bias) {
    require(token >= 0, "logit_bias: token", token, "0 or more");
    require(!std::isnan(bias), "logit_bias", static_cast<double>(bias), "a number");
  }
}

void Sampler::check(int vocab_size, const std::string& where) const {
  for (const auto& [token, bias] : options_.logit_bias) {
    if (token < vocab_size) continue;
    throw Error(ErrorKind::invalid_argument, where + ": logit_bias: token " + std::to_string(token) +
                                                 ", allowed 0 to " + std::to_string(vocab_size - 1));
  }
  const std::lock_guard lock(mutex_);
  if (allowed_.empty()) return;
  const std::size_t vocab = static_cast<std::size_t>(vocab_size);
  if (const std::size_t words = (vocab + kWordBits - 1) / kWordBits; allowed_.size() != words) {
    throw Error(ErrorKind::invalid_argument, where + ": mask: found " + std::to_string(allowed_.size()) +
                                                 " words, allowed " + std::to_string(words));
  }
  if (first_allowed_ >= vocab) {
    throw Error(ErrorKind::invalid_argument, where + ": mask: allows no token of the vocabulary");
  }
}

void Sampler::allow(std::span<const std::uint32_t> words) {
  const auto set = std::find_if(words.begin(), words.end(), [](std::uint32_t word) { return word != 0; });
  if (!words.empty() && set == words.end()) {
    throw Error(ErrorKind::invalid_argument, "mask: allows no token");
  }
  const std::lock_guard lock(mutex_);
  allowed_.assign(words.begin(), words.end());
  if (words.empty()) return;
  first_allowed_ = static_cast<std::size_t>(set - words.begin()) * kWordBits +
                   static_cast<std::size_t>(std::countr_zero(*set));
}

void Sampler::accept(std::span<const std::int32_t> tokens) {
  const SamplerOptions& o = options_;
  if (o.repetition_penalty == 1 && o.presence_penalty == 0 && o.frequency_penalty == 0) return;
  const std::lock_guard lock(mutex_);
  for (const std::int32_t token : tokens) {
    history_.push_back(token);
    ++counts_[token];
  }
  if (o.penalty_window < 0) return;
  const std::size_t window = static_cast<std::size_t>(o.penalty_window);
  const std::size_t over = history_.size() > window ? history_.size() - window : 0;
  for (std::size_t i = 0; i < over; ++i) {
    if (--counts_[history_[i]] == 0) counts_.erase(history_[i]);
  }
  history_.erase(history_.begin(), history_.begin() + static_cast<std::ptrdiff_t>(over));
}

void Sampler::mask(std::span<float> logits) const {
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  for (std::size_t word = 0; word < allowed_.size(); ++word) {
    const std::size_t first = word * kWordBits;
    const std::span<float> some = logits.subspan(first, std::min(kWordBits, logits.size() - first));
    if (allowed_[word] == 0) {
      std::fill(some.begin(), some.end(), kNever);
      continue;
    }
    for (std::uint32_t barred = ~allowed_[word]; barred != 0; barred &= barred - 1) {
      const std::size_t bit = static_cast<std::size_t>(std::countr_zero(barred));
      if (bit < some.size()) some[bit] = kNever;
    }
  }
}

void Sampler::adjust(std::span<float> logits) const {
  const SamplerOptions& o = options_;
  for (const auto& [token, bias] : o.logit_bias) {
    logits[static_cast<std::size_t>(token)] += bias;
  }
  for (const auto& [token, count] : counts_) {
    if (static_cast<std::size_t>(token) >= logits.size()) continue;
    float& logit = logits[static_cast<std::size_t>(token)];
    logit = logit > 0 ? logit / o.repetition_penalty : logit * o.repetition_penalty;
    logit -= o.presence_penalty + o.frequency_penalty * static_cast<float>(count);
  }
}

Sample Sampler::sample(std::span<float> logits, std::int64_t position, std::span<Candidate> space) const {
  const std::lock_guard lock(mutex_);
  Sample sample;
  sample.logprob = std::numeric_limits<float>::quiet_NaN();
  std::unordered_map<std::int32_t, float> original;  // of the few that change: logprobs speak of the model
  if (options_.logprobs >= 0) {
    report_logprobs(sample, logits, options_.logprobs, space);
    const auto keep = [&](std::int32_t token) {
      if (static_cast<std::size_t>(token) < logits.size())
        original.emplace(token, logits[static_cast<std::size_t>(token)]);
    };
    for (const auto& entry : options_.logit_bias) keep(entry.first);
    for (const auto& entry : counts_) keep(entry.first);
  }
  mask(logits);
  adjust(logits);
  sample.token = options_.temperature == 0 ? argmax(logits) : draw(logits, position, space);
  const auto changed = original.find(sample.token);
  sample.logprob +=
      changed != original.end() ? changed->second : logits[static_cast<std::size_t>(sample.token)];
  return sample;
}

std::int32_t Sampler::draw(std::span<const float> logits, std::int64_t position,
                           std::span<Candidate> space) const {
  const SamplerOptions& o = options_;
  const float maximum = logits[static_cast<std::size_t>(argmax(logits))];
  const double inverse = 1 / static_cast<double>(o.temperature);
  const auto weight = [&](float logit) {
    return std::exp((static_cast<double>(logit) - static_cast<double>(maximum)) * inverse);
  };

  // Only what passes min-p can be drawn; without it, only what a double can tell from zero.
  const double floor = std::max(static_cast<double>(o.min_p), 1e-30);
  std::size_t passed = 0;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if (weight(logits[i]) >= floor)
      space[passed++] = {logits[i], static_cast<std::int32_t>(i)};  // NaN does not
  }
  std::span<Candidate> candidates = space.first(passed);
  if (o.top_k > 0 && static_cast<std::size_t>(o.top_k) < passed) {
    std::nth_element(candidates.begin(), candidates.begin() + o.top_k, candidates.end(), better);
    candidates = candidates.first(static_cast<std::size_t>(o.top_k));
    std::sort(candidates.begin(), candidates.end(), better);  // so that the sum has one order
  }
  double total = 0;  // top-p is a share of what min-p and top-k left
  for (const auto& [logit, token] : candidates) total += weight(logit);

  BestFirst best(candidates);
  std::size_t count = candidates.size();
  double kept = total;
  if (o.top_p < 1) {
    kept = 0;
    count = 0;
    while (count < candidates.size() && (count == 0 || kept < static_cast<double>(o.top_p) * total)) {
      kept += weight(best[count++].first);
    }
  }
  double target = uniform(o.seed, stream_, static_cast<std::uint64_t>(position)) * kept;
  for (std::size_t i = 0; i + 1 < count; ++i) {
    target -= weight(best[i].first);
    if (target < 0) return best[i].second;
  }
  return best[count - 1].second;
}

}  // namespace edgert
