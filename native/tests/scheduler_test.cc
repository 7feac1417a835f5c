// Many requests at once: each gets what it would get alone, whatever happens to the others.
#include "engine/scheduler.h"

#include <algorithm>
#include <bit>
#include <fstream>
#include <limits>
#include <map>

#include "model_support.h"
#include "platform/error.h"
#include "small_bundle.h"
#include "support.h"

using namespace edgert;
using test::contains;
using test::error_of;
using test::make_runtime;
using test::some_tokens;
using test::TemporaryDirectory;

namespace {

constexpr int kVocab = 67;

std::shared_ptr<Sampler> sampler(int seed, const std::vector<std::int32_t>& prompt) {
  SamplerOptions options;
  options.temperature = 1;
  options.seed = static_cast<std::uint64_t>(seed);
  options.logprobs = 0;
  options.frequency_penalty = 0.5F;
  auto made = std::make_shared<Sampler>(options);
  made->accept(prompt);
  return made;
}

// Prompts of unlike lengths; every third begins as the one before.
std::vector<std::int32_t> prompt(int number) {
  auto tokens = some_tokens(1 + number * 13 % 50, kVocab, number / 3);
  if (number % 3 == 2) tokens.push_back(number % kVocab);
  return tokens;
}

Request request(int number, std::int64_t max_tokens = 20) {
  Request made;
  made.prompt = prompt(number);
  made.sampler = sampler(number, made.prompt);
  made.max_tokens = max_tokens;
  return made;
}

// A token and the bits of its logprob.
using Drawn = std::vector<std::pair<std::int32_t, std::uint32_t>>;

std::pair<std::int32_t, std::uint32_t> of(const Sample& sample) {
  return {sample.token, std::bit_cast<std::uint32_t>(sample.logprob)};
}

// By the model, with nobody else there; ends early where it fails.
Drawn alone(Model& model, Request given) {
  Drawn out;
  const auto sequence = model.sequence();
  std::vector<std::int32_t> tokens = given.prompt;
  try {
    while (static_cast<std::int64_t>(out.size()) < given.max_tokens) {
      const SampleRow row{sequence.get(), tokens, given.sampler.get()};
      const auto sample = model.sample(std::span(&row, 1), {});
      out.push_back(of(*sample[0]));
      tokens = {sample[0]->token};
    }
  } catch (const Error&) {
  }
  return out;
}

struct Outcome {
  Drawn drawn;
  Finish finish = Finish::none;
  std::exception_ptr error;
  std::int64_t cached = 0;
};

// Until all of these have ended.
std::map<std::uint64_t, Outcome> wait(Scheduler& scheduler, std::size_t count,
                                      const std::function<void(const RequestEvent&)>& seen = {}) {
  std::map<std::uint64_t, Outcome> out;
  for (std::size_t ended = 0; ended < count;) {
    for (const RequestEvent& event : scheduler.events()) {
      Outcome& outcome = out[event.request];
      CHECK(outcome.finish == Finish::none);
      if (event.sample) outcome.drawn.push_back(of(*event.sample));
      outcome.finish = event.finish;
      outcome.error = event.error;
      outcome.cached = event.cached_tokens;
      if (event.finish != Finish::none) ++ended;
      if (seen) seen(event);
    }
  }
  return out;
}

struct Served {
  TemporaryDirectory directory;
  std::filesystem::path path = test::write_small_bundle(directory.path(), {});
  Model reference{make_runtime(), path, {}};

  std::shared_ptr<Model> model(int parallel, bool paged = false, int chunk = 0) const {
    constexpr int kThreads = 2;
    const ModelOptions options{0, parallel, chunk, std::nullopt};
    const std::uint64_t memory = paged ? test::minimum(path, options, kThreads) : 1 << 30;
    return std::make_shared<Model>(make_runtime(memory, kThreads), path, options);
  }
};

}  // namespace

TEST_CASE("requests among others get what they get alone, resident and paged, and when KV blocks run dry") {
  Served f;
  std::vector<Drawn> expected;
  for (int i = 0; i < 24; ++i) expected.push_back(alone(f.reference, request(i, 45)));
  struct Setting {
    int parallel, chunk;
    bool paged, dry;
  };
  for (const Setting& setting : {Setting{24, 0, false, false}, Setting{8, 0, true, true},
                                 Setting{1, 0, false, true}, Setting{2, 3, true, true}}) {
    Scheduler scheduler(f.model(setting.parallel, setting.paged, setting.chunk), 64);
    for (int i = 0; i < 24; ++i)
      REQUIRE(scheduler.submit(request(i, 45)) == static_cast<std::uint64_t>(i + 1));
    for (const auto& [number, outcome] : wait(scheduler, 24)) {
      CHECK(outcome.finish == Finish::length);
      CHECK(outcome.drawn == expected[number - 1]);
    }
    CHECK((scheduler.statistics().preempted > 0) == setting.dry);
    CHECK(scheduler.statistics().cached_tokens > 0);
    CHECK(scheduler.statistics().waiting == 0);
  }
}

TEST_CASE("requests may come and be cancelled at any time: the others do not notice") {
  Served f;
  std::vector<Drawn> expected;
  for (int i = 0; i < 20; ++i) expected.push_back(alone(f.reference, request(i)));
  Scheduler scheduler(f.model(3), 64);
  int next = 0;
  for (; next < 6; ++next) scheduler.submit(request(next));
  const auto outcomes = wait(scheduler, 20, [&](const RequestEvent& event) {
    if (next < 20) scheduler.submit(request(next++));
    if (event.request % 4 == 0) scheduler.cancel(event.request);
    if (event.request == 7) scheduler.cancel(9);
  });
  int whole = 0;
  for (const auto& [number, outcome] : outcomes) {
    const Drawn& all = expected[number - 1];
    CHECK(std::equal(outcome.drawn.begin(), outcome.drawn.end(), all.begin()));
    const bool cancelled = number % 4 == 0 || number == 9;
    if (!cancelled) CHECK(outcome.finish == Finish::length);
    if (outcome.finish == Finish::length) ++whole;
  }
  CHECK(whole >= 14);
}

TEST_CASE("a request whose token cannot be drawn ends with its error; its neighbours go on") {
  Served f;
  Scheduler scheduler(f.model(8), 64);
  for (int i = 0; i < 6; ++i) {
    Request one = request(i);
    if (i == 2) {
      SamplerOptions options;
      for (int token = 0; token < kVocab; ++token)
        options.logit_bias.emplace_back(token, -std::numeric_limits<float>::infinity());
      one.sampler = std::make_shared<Sampler>(options);
    }
    if (i == 4) one.sampler->allow(std::vector<std::uint32_t>(99, 1));  // of another vocabulary
    if (i == 5) one.prompt = {5, kVocab};
    scheduler.submit(std::move(one));
  }
  for (const auto& [number, outcome] : wait(scheduler, 6)) {
    const bool bad = number == 3 || number >= 5;
    CHECK(outcome.finish == (bad ? Finish::error : Finish::length));
    CHECK(outcome.drawn == (bad ? Drawn{} : alone(f.reference, request(static_cast<int>(number) - 1))));
    if (bad) CHECK_THROWS_AS(std::rethrow_exception(outcome.error), Error);
  }
}

TEST_CASE("an expert that cannot be read ends those that need it, and nobody else") {
  Served f;
  {
    const Bundle bundle = Bundle::open(f.path, DirectIo::off);
    const auto offset = bundle.manifest().experts[1].experts[3].extent.offset;
    std::fstream file(f.path / "experts-00000.bin", std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(offset) + 5);
    file.put('\x55');
  }
  Model damaged(make_runtime(), f.path, {});
  std::vector<Drawn> expected;
  for (int i = 0; i < 12; ++i) expected.push_back(alone(damaged, request(i, 3)));
  Scheduler scheduler(f.model(12, true), 64);
  for (int i = 0; i < 12; ++i) scheduler.submit(request(i, 3));
  int failed = 0;
  for (const auto& [number, outcome] : wait(scheduler, 12)) {
    CHECK(outcome.drawn == expected[number - 1]);
    CHECK((outcome.finish == Finish::error) == (outcome.drawn.size() < 3));
    if (outcome.finish != Finish::error) continue;
    ++failed;
    CHECK(contains(error_of(ErrorKind::corrupt, [&] { std::rethrow_exception(outcome.error); }), "expert 3"));
  }
  CHECK(failed > 0);
  CHECK(failed < 12);
}

TEST_CASE("a long prompt is run in pieces beside those who stream") {
  Served f;
  auto model = f.model(2, false, 16);
  Scheduler scheduler(model, 64);
  scheduler.submit(request(0, 40));
  int before = 0, beside = 0;
  bool asked = false, answered = false;
  Request longer;
  longer.prompt = some_tokens(90, kVocab, 9);
  longer.sampler = sampler(1, longer.prompt);
  longer.max_tokens = 1;
  wait(scheduler, 2, [&](const RequestEvent& event) {
    if (event.request == 2)
      answered = true;
    else if (!asked)
      ++before;
    else if (!answered)
      ++beside;
    if (!std::exchange(asked, true)) scheduler.submit(std::move(longer));
  });
  CHECK(before == 1);
  CHECK(beside >= 2);
}

TEST_CASE("who begins as one that is being run waits for that beginning, and has it for nothing") {
  Served f;
  Scheduler scheduler(f.model(4), 64);
  for (int i = 0; i < 3; ++i) {
    Request one;
    one.prompt = some_tokens(70, kVocab);
    one.sampler = sampler(i, one.prompt);
    one.max_tokens = 4;
    scheduler.submit(std::move(one));
  }
  const auto outcomes = wait(scheduler, 3);
  CHECK(outcomes.at(1).cached == 0);
  CHECK(outcomes.at(2).cached == 64);
  CHECK(outcomes.at(3).cached == 64);
}

TEST_CASE("a paced request waits for the word before each token but the first; others do not") {
  Served f;
  Scheduler scheduler(f.model(4), 64);
  Request paced = request(1, 3);
  paced.paced = true;
  scheduler.submit(std::move(paced));
  int of_paced = 0;
  for (int i = 2; i < 5; ++i) scheduler.submit(request(i));
  wait(scheduler, 3, [&](const RequestEvent& event) { of_paced += event.request == 1; });
  CHECK(of_paced == 1);
  scheduler.proceed(1);
  const auto outcomes =
      wait(scheduler, 1, [&](const RequestEvent& event) { scheduler.proceed(event.request); });
  CHECK(outcomes.at(1).drawn.size() == 2);
  CHECK(outcomes.at(1).finish == Finish::length);
}

TEST_CASE("a paced request that the others did not wait for draws what it draws alone") {
  Served f;
  const Drawn expected = alone(f.reference, request(1, 8));
  Scheduler scheduler(f.model(4), 64);
  Request paced = request(1, 8);
  paced.paced = true;
  scheduler.submit(std::move(paced));
  for (int i = 2; i < 5; ++i) scheduler.submit(request(i, 40));
  int running = 3;
  int since = 0;  // tokens of the others, while it waits for the word
  bool waits = false;
  const auto outcomes = wait(scheduler, 4, [&](const RequestEvent& event) {
    if (event.request == 1) {
      waits = true;
      since = 0;
    } else {
      running -= event.finish != Finish::none;
      ++since;
    }
    if (waits && (since >= 12 || running == 0)) {
      waits = false;
      scheduler.proceed(1);
    }
  });
  CHECK(outcomes.at(1).drawn == expected);
  CHECK(outcomes.at(1).finish == Finish::length);
}

TEST_CASE("a paced request that is cancelled while its step waits ends") {
  Served f;
  Scheduler scheduler(f.model(1), 64);
  Request paced = request(1, 8);
  paced.paced = true;
  scheduler.submit(std::move(paced));
  const Outcome outcome =
      wait(scheduler, 1, [&](const RequestEvent& event) { scheduler.cancel(event.request); }).at(1);
  CHECK(outcome.finish == Finish::cancelled);
  CHECK(outcome.drawn.size() == 1);
}

TEST_CASE("an end token ends a request") {
  Served f;
  const Drawn expected = alone(f.reference, request(1));
  Scheduler scheduler(f.model(1), 64);
  Request one = request(1);
  one.ends = {expected[3].first};
  scheduler.submit(std::move(one));
  const Outcome outcome = wait(scheduler, 1).at(1);
  CHECK(outcome.finish == Finish::stop);
  CHECK(outcome.drawn.size() <= 4);
}

TEST_CASE("what can never run is refused, and so is one too many") {
  Served f;
  Scheduler scheduler(f.model(1), 2);
  const auto refused = [&](Request one) {
    return error_of(ErrorKind::invalid_argument, [&] { scheduler.submit(std::move(one)); });
  };
  Request empty = request(1);
  empty.prompt.clear();
  CHECK(contains(refused(std::move(empty)), "no tokens"));
  Request full = request(1);
  full.prompt = some_tokens(96, kVocab);
  CHECK(contains(refused(std::move(full)), "allowed are 95"));
  Request none = request(1, 0);
  CHECK(contains(refused(std::move(none)), "max_tokens"));
  int taken = 0;
  while (taken < 1000 && scheduler.submit(request(0, 90))) ++taken;
  CHECK(taken >= 2);
  CHECK(taken < 1000);
  scheduler.close();
  CHECK(contains(refused(request(1)), "closed"));
  int cancelled = 0;
  for (auto events = scheduler.events(); !events.empty(); events = scheduler.events()) {
    for (const RequestEvent& event : events) cancelled += event.finish == Finish::cancelled;
  }
  CHECK(cancelled > 0);
}

TEST_CASE("a scheduler and other users of its model take turns") {
  Served f;
  auto model = f.model(4);
  Scheduler scheduler(model, 64);
  for (int i = 0; i < 4; ++i) scheduler.submit(request(i, 60));
  const auto tokens = some_tokens(10, kVocab, 5);
  const auto expected = test::all_logits(f.reference, tokens);
  for (int i = 0; i < 5; ++i) CHECK(test::all_logits(*model, tokens) == expected);
  wait(scheduler, 4);
}

TEST_CASE(
    "the cost of a step is learnt: what fits into a time, and never less than what a step costs anyway") {
  StepCost cost;
  CHECK(cost.rows_within(1) == 0);
  cost.add(64, 0.64);
  CHECK(cost.rows_within(0.2) == doctest::Approx(20).epsilon(0.1));
  for (int i = 0; i < 60; ++i) {
    cost.add(4, 0.10 + 4 * 0.01);
    cost.add(40, 0.10 + 40 * 0.01);
  }
  CHECK(cost.rows_within(0.3) == doctest::Approx(20).epsilon(0.1));
  CHECK(cost.rows_within(0.05) == doctest::Approx(10).epsilon(0.2));
}
