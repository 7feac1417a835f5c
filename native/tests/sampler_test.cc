#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "support.h"

using namespace edgert;
using test::contains;
using test::error_of;

namespace {

Sample sample(const Sampler& sampler, std::vector<float> logits, std::int64_t position) {
  std::vector<Candidate> space(logits.size());
  return sampler.sample(logits, position, space);
}

}  // namespace

TEST_CASE("sampling depends on seed, stream and position alone") {
  std::vector<float> logits;
  for (int i = 0; i < 50; ++i) logits.push_back(static_cast<float>(i % 7));
  SamplerOptions options;
  options.temperature = 1;
  options.seed = 3;
  const auto draw = [&](std::uint64_t seed, std::uint64_t stream, std::int64_t position) {
    SamplerOptions o = options;
    o.seed = seed;
    return sample(Sampler(o, stream), logits, position).token;
  };
  CHECK(draw(3, 0, 10) == draw(3, 0, 10));
  int differ = 0;
  for (int p = 0; p < 40; ++p) differ += (draw(3, 0, p) != draw(3, 1, p)) + (draw(3, 0, p) != draw(4, 0, p));
  CHECK(differ > 40);
}

TEST_CASE("top-k, top-p, min-p, bias and penalties do what their names say") {
  const std::vector<float> logits{0, 3, 2, 1, 3};
  const auto reachable = [&](const SamplerOptions& options) {
    std::vector<std::int32_t> seen;
    for (int p = 0; p < 300; ++p) {
      const auto token = sample(Sampler(options), logits, p).token;
      if (std::find(seen.begin(), seen.end(), token) == seen.end()) seen.push_back(token);
    }
    std::sort(seen.begin(), seen.end());
    return seen;
  };
  using Ids = std::vector<std::int32_t>;
  SamplerOptions o;
  CHECK(reachable(o) == Ids{1});  // greedy, lowest id among equals
  o.temperature = 1;
  CHECK(reachable(o) == Ids{0, 1, 2, 3, 4});
  o.top_k = 2;
  CHECK(reachable(o) == Ids{1, 4});
  o.top_k = 0;
  o.top_p = 0.85F;
  CHECK(reachable(o) == Ids{1, 2, 4});
  o.top_p = 1;
  o.min_p = 0.3F;
  CHECK(reachable(o) == Ids{1, 2, 4});
  o.top_p = 0.82F;  // a share of what min-p left: 1 and 4 are 0.84 of it, and 0.78 of everything
  CHECK(reachable(o) == Ids{1, 4});
  o.top_k = 4;  // cuts nothing off: changes nothing
  CHECK(reachable(o) == Ids{1, 4});
  o.top_p = 1;
  o.top_k = 0;
  o.min_p = 0;
  o.logit_bias = {{0, 100.0F}};
  CHECK(reachable(o) == Ids{0});

  SamplerOptions penalised;
  penalised.repetition_penalty = 2;
  Sampler sampler(penalised);
  sampler.accept(Ids{1});
  CHECK(sample(sampler, logits, 0).token == 4);
  sampler.accept(Ids{4});
  CHECK(sample(sampler, logits, 1).token == 2);
}

TEST_CASE("log-probabilities are those of the model, whatever the sampling") {
  const std::vector<float> logits{1, 2, 0.5F};
  SamplerOptions o;
  o.logprobs = 2;
  o.logit_bias = {{2, 50.0F}};
  const Sample drawn = sample(Sampler(o), logits, 0);
  CHECK(drawn.token == 2);
  const double norm = std::log(std::exp(1.0) + std::exp(2.0) + std::exp(0.5));
  CHECK(drawn.logprob == doctest::Approx(0.5 - norm));
  REQUIRE(drawn.top.size() == 2);
  CHECK(drawn.top[0].first == 1);
  CHECK(drawn.top[0].second == doctest::Approx(2 - norm));
}

TEST_CASE("sampling parameters out of range are refused by name") {
  const auto refused = [](auto set) {
    SamplerOptions o;
    set(o);
    return error_of(ErrorKind::invalid_argument, [&] { Sampler sampler(o); });
  };
  CHECK(contains(refused([](auto& o) { o.temperature = std::numeric_limits<float>::quiet_NaN(); }),
                 "temperature"));
  CHECK(contains(refused([](auto& o) { o.top_p = 0; }), "top_p"));
  CHECK(contains(refused([](auto& o) { o.min_p = 2; }), "min_p"));
  CHECK(contains(refused([](auto& o) { o.repetition_penalty = 0; }), "repetition_penalty"));
  CHECK(contains(refused([](auto& o) { o.logprobs = 1000; }), "logprobs"));
}

TEST_CASE("logits without a usable value are an error, not a token") {
  std::vector<float> logits{std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()};
  error_of(ErrorKind::invalid_argument, [&] { sample(Sampler({}), logits, 0); });
}

TEST_CASE("a mask bars tokens whatever their logits and biases, and logprobs stay the model's") {
  std::vector<float> logits(70, 0.0F);
  logits[3] = 9;
  logits[69] = 1;
  SamplerOptions o;
  o.logprobs = 1;
  o.logit_bias = {{3, 1000.0F}, {40, 2000.0F}, {41, -std::numeric_limits<float>::infinity()}};
  o.repetition_penalty = 2;
  for (const float temperature : {0.0F, 1.0F}) {
    o.temperature = temperature;
    Sampler sampler(o);
    sampler.accept(std::vector<std::int32_t>{3, 40});
    sampler.allow(
        std::vector<std::uint32_t>{0, 0, 1U << 5 | 1U << 30});  // token 69, and one past the vocabulary
    sampler.check(70, "row 0");
    for (int position = 0; position < 20; ++position) {
      const Sample drawn = sample(sampler, logits, position);
      CHECK(drawn.token == 69);
      CHECK(drawn.top[0].first == 3);
      CHECK(drawn.logprob == doctest::Approx(1 - std::log(std::exp(9.0) + std::exp(1.0) + 68)));
    }
    sampler.allow({});
    CHECK(sample(sampler, logits, 0).token == 40);
  }
}

TEST_CASE("a draw among the allowed is the draw from logits that are low elsewhere") {
  std::vector<float> logits, low;
  for (int i = 0; i < 100; ++i) {
    logits.push_back(static_cast<float>(i % 9));
    low.push_back(i % 3 == 0 ? logits.back() : -1e30F);
  }
  std::vector<std::uint32_t> words(4, 0);
  for (std::size_t i = 0; i < 100; i += 3) words[i / 32] |= 1U << i % 32;
  SamplerOptions o;
  o.temperature = 1;
  Sampler masked(o), plain(o);
  masked.allow(words);
  for (int p = 0; p < 200; ++p) CHECK(sample(masked, logits, p).token == sample(plain, low, p).token);
}

TEST_CASE("a mask that allows nothing, or is of another vocabulary, is refused") {
  Sampler sampler({});
  error_of(ErrorKind::invalid_argument, [&] { sampler.allow(std::vector<std::uint32_t>{0, 0}); });
  sampler.check(64, "row 0");  // it did not take hold
  sampler.allow(std::vector<std::uint32_t>{0, 8});
  sampler.check(36, "row 0");
  CHECK(contains(error_of(ErrorKind::invalid_argument, [&] { sampler.check(35, "row 2"); }), "row 2: mask"));
  CHECK(contains(error_of(ErrorKind::invalid_argument, [&] { sampler.check(65, "row 2"); }), "allowed 3"));
  CHECK(contains(error_of(ErrorKind::invalid_argument, [&] { sampler.check(32, "row 2"); }), "allowed 1"));
}

TEST_CASE("top-p keeps the likeliest of many, and reaches all of them") {
  std::vector<float> logits;
  for (int i = 0; i < 5000; ++i) logits.push_back(static_cast<float>(i * 7919 % 5000) * 0.0005F);
  std::vector<float> falling = logits;
  std::sort(falling.begin(), falling.end(), std::greater<>());
  double total = 0;
  for (const float x : falling) total += std::exp(static_cast<double>(x));
  SamplerOptions o;
  o.temperature = 1;
  for (const float top_p : {0.3F, 1.0F}) {
    double kept = 0;
    std::size_t count = 0;
    while (count < falling.size() && kept < static_cast<double>(top_p) * total) {
      kept += std::exp(static_cast<double>(falling[count++]));
    }
    o.top_p = top_p;
    const Sampler sampler(o);
    float lowest = falling[0];
    for (int p = 0; p < 2000; ++p) {
      lowest = std::min(lowest, logits[static_cast<std::size_t>(sample(sampler, logits, p).token)]);
    }
    CHECK(lowest >= falling[count - 1]);
    CHECK(lowest <= falling[count - count / 50]);
  }
}
