// From logits to a token.
//
// Order: mask, logit bias, penalties, temperature, min-p, top-k, top-p, draw. Each draw is a pure function of
// (seed, stream, position): what else the engine does cannot change it.
// Threads: a sampler belongs to one sequence; its methods may be called from any thread.
#pragma once

#include <cstdint>
#include <mutex>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace edgert {

struct SamplerOptions {
  float temperature = 0;  // 0: the largest logit, lowest id first
  int top_k = 0;          // 0: off
  float top_p = 1;
  float min_p = 0;
  float repetition_penalty = 1;
  float presence_penalty = 0;
  float frequency_penalty = 0;
  int penalty_window = -1;  // tokens that the penalties look back on; -1: all
  std::uint64_t seed = 0;
  std::vector<std::pair<std::int32_t, float>> logit_bias;
  int logprobs = -1;  // -1: none; n: the token's own and the n best
};

struct Sample {
  std::int32_t token = 0;
  float logprob = 0;  // of the unmodified distribution; nan without logprobs
  std::vector<std::pair<std::int32_t, float>> top;
};

// A logit and its token.
using Candidate = std::pair<float, std::int32_t>;

class Sampler {
 public:
  static constexpr int kMaxLogprobs = 100;
  // Error{invalid_argument} names the field, what was found and what is allowed.
  explicit Sampler(SamplerOptions options, std::uint64_t stream = 0);
  static constexpr std::uint64_t space_bytes(int vocab_size) noexcept {
    return static_cast<std::uint64_t>(vocab_size) * sizeof(Candidate);
  }

  // Error{invalid_argument} naming `where` if a biased token lies past the vocabulary, or the mask is of
  // another vocabulary or allows nothing in it.
  void check(int vocab_size, const std::string& where) const;

  // Tokens that the penalties should know: the prompt's, and those drawn here once they stand.
  void accept(std::span<const std::int32_t> tokens);

  // From now on only these tokens are drawn, whatever the biases: bit t % 32 of word t / 32, ceil(vocab / 32)
  // words. None: all are. Logprobs stay those of the unmodified distribution. Error{invalid_argument} where
  // no bit is set: then the mask before stays.
  void allow(std::span<const std::uint32_t> words);

  // Draws for `position`, the place the token will take. Changes `logits` [vocab]; works in `space`, of the
  // same length. REQUIRES check(). Error{invalid_argument} where every logit is infinite or NaN.
  Sample sample(std::span<float> logits, std::int64_t position, std::span<Candidate> space) const;

 private:
  void mask(std::span<float> logits) const;
  void adjust(std::span<float> logits) const;
  std::int32_t draw(std::span<const float> logits, std::int64_t position, std::span<Candidate> space) const;

  const SamplerOptions options_;
  const std::uint64_t stream_;
  mutable std::mutex mutex_;                      // of what follows
  std::vector<std::uint32_t> allowed_;            // a bit a token; none: all
  std::size_t first_allowed_ = 0;                 // the lowest bit that is set
  std::vector<std::int32_t> history_;             // within the window
  std::unordered_map<std::int32_t, int> counts_;  // of history_
};

}  // namespace edgert
