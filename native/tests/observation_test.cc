#include "model/observation.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <numeric>

#include "model_support.h"
#include "platform/error.h"
#include "small_bundle.h"
#include "support.h"

namespace edgert {
namespace {

using test::some_tokens;

using Arrays = std::map<std::string, std::pair<std::vector<std::int64_t>, std::vector<double>>>;

Arrays observed(const Model& model) {
  Arrays arrays;
  model.observed([&](const Observation& observation) {
    for (const auto& s : observation.statistics())
      arrays[s.name] = {{s.counts.begin(), s.counts.end()}, {s.values.begin(), s.values.end()}};
  });
  return arrays;
}

Arrays measure(const std::filesystem::path& bundle, int threads, int chunk, std::uint64_t memory = 1 << 30) {
  ModelOptions options;
  options.context = 96;
  options.chunk = chunk;
  options.moments = MomentsKind::full;
  if (memory == 0) memory = test::minimum(bundle, options, threads);
  Model model(test::make_runtime(memory, threads), bundle, options);
  for (const int length : {50, 7}) test::all_logits(model, some_tokens(length, 67, length));
  return observed(model);
}

}  // namespace

TEST_CASE("what a model does is counted, whoever runs it") {
  const test::TemporaryDirectory directory;
  const auto bundle = test::write_small_bundle(directory.path(), {});
  const Arrays first = measure(bundle, 1, 32);
  const auto sum = [&](const std::string& name) {
    const auto& counts = first.at(name).first;
    return std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
  };
  CHECK(sum("layers.0.experts.tokens") == 57 * 2);
  CHECK(sum("layers.1.experts.before_1") == 57 * 4);
  CHECK(sum("layers.2.experts.before_2") == 57 * 4);
  CHECK(sum("layers.2.experts.token_before") == (49 + 6) * 4);  // the first tokens of sequences follow none
  CHECK(first.at("layers.0.experts.inner.triangle").first == first.at("layers.0.experts.tokens").first);
  CHECK(first.at("output.triangle").first == std::vector<std::int64_t>{57});

  CHECK(measure(bundle, 3, 32) == first);
  CHECK(measure(bundle, 2, 32, 0) == first);
  const Arrays other = measure(bundle, 1, 5);
  for (const auto& [name, array] : first) {
    CAPTURE(name);
    CHECK(other.at(name).first == array.first);
    if (array.second.empty()) continue;
    const double largest = *std::ranges::max_element(array.second);
    for (std::size_t i = 0; i < array.second.size(); ++i)
      CHECK(std::abs(other.at(name).second[i] - array.second[i]) <= 1e-5 * largest);
  }
}

TEST_CASE("nothing is measured unless it was asked for") {
  const test::TemporaryDirectory directory;
  Model model(test::make_runtime(), test::write_small_bundle(directory.path(), {}), {});
  CHECK_THROWS_AS(observed(model), Error);
  CHECK_THROWS_AS(moments("some"), Error);
  CHECK(moments("auto") == MomentsKind::automatic);
}

TEST_CASE("whole matrices are kept as far as their sums fit") {
  const test::TemporaryDirectory directory;
  const Bundle bundle = Bundle::open(test::write_small_bundle(directory.path(), {}), DirectIo::off);
  Recipe recipe = recipe_of(bundle);
  const auto bytes = [&](MomentsKind kind) { return Observation::sums_bytes(recipe, kind); };
  CHECK(bytes(MomentsKind::automatic) == bytes(MomentsKind::full));
  recipe.hidden_size = 4096;  // 3 layers of 67 MB each: single experts are given up
  CHECK(bytes(MomentsKind::automatic) > bytes(MomentsKind::diagonal) + 400'000'000);
  CHECK(bytes(MomentsKind::automatic) < Observation::kAutomaticBytes);
  CHECK(bytes(MomentsKind::full) > Observation::kAutomaticBytes);
  recipe.hidden_size = 1 << 15;  // a layer alone would be too much
  CHECK(bytes(MomentsKind::automatic) == bytes(MomentsKind::diagonal));
}

}  // namespace edgert
