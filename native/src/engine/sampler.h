// From logits to a token.
//
// Order: logit bias, penalties, temperature, min-p, top-k, top-p, draw. Each draw is a pure function of
// (seed, stream, position): what else the engine does cannot change it.
// Threads: a sampler belongs to one sequence and is used by one thread at a time.
#pragma once

#include <cstdint>
#include <span>
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

class Sampler {
 public:
  static constexpr int kMaxLogprobs = 100;
  // Error{invalid_argument} names the field, what was found and what is allowed.
  explicit Sampler(SamplerOptions options, std::uint64_t stream = 0);

  // Tokens that the penalties should know and that were not sampled here.
  void accept(std::span<const std::int32_t> tokens);

  // Draws for `position`, the place the token will take, and accepts it. Changes `logits` [vocab].
  // Error{invalid_argument} where a biased token lies past the vocabulary or every logit is -inf or NaN.
  Sample sample(std::span<float> logits, std::int64_t position);

 private:
  void adjust(std::span<float> logits) const;
  std::int32_t draw(std::span<const float> logits, std::int64_t position);

  SamplerOptions options_;
  std::uint64_t stream_;
  std::vector<std::int32_t> history_;                       // within the window
  std::unordered_map<std::int32_t, int> counts_;            // of history_
  std::vector<std::pair<float, std::int32_t>> candidates_;  // kept between draws
};

}  // namespace edgert
