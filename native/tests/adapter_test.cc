// An adapter by itself: what is refused, its fingerprint, its memory.
#include "adapters/adapter.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "overlay_support.h"
#include "support.h"

using namespace edgert;
using test::contains;
using test::error_of;
using test::kInputs;
using test::kWide;
using test::Numbers;
using test::Step;

namespace {

std::string refusal(const std::function<void(Numbers&)>& change,
                    ErrorKind kind = ErrorKind::invalid_argument) {
  Step step(1);
  Random random(1);
  Numbers numbers = Numbers::low_rank(2, random);
  const Numbers few = Numbers::sparse(4, random);
  numbers.rows = few.rows;
  numbers.cols = few.cols;
  numbers.values = few.values;
  change(numbers);
  return error_of(kind, [&] { step.adapter(numbers); });
}

}  // namespace

TEST_CASE("a mix's fingerprint is of contents, scales and the order in which they add") {
  Random random(3);
  Step step(1);
  const Numbers one = Numbers::low_rank(2, random);
  const Numbers two = Numbers::sparse(9, random);
  Numbers other = one;
  other.b[3] += 0.5F;
  const auto a = step.adapter(one, "a");
  const auto b = step.adapter(two, "b");
  const auto again = step.adapter(one, "again");
  const auto fingerprint = [](std::vector<AdapterMix::Entry> entries) {
    return AdapterMix{std::move(entries)}.fingerprint();
  };
  CHECK(fingerprint({}) == 0);
  CHECK(fingerprint({{a, 0}}) == 0);
  CHECK(fingerprint({{a, 1}, {b, 0}}) == fingerprint({{a, 1}}));
  CHECK(fingerprint({{a, 1}}) == fingerprint({{again, 1}}));
  CHECK(fingerprint({{a, 1}, {b, 2}}) == fingerprint({{b, 2}, {a, 1}}));
  const std::uint64_t different[] = {0,
                                     fingerprint({{a, 1}}),
                                     fingerprint({{a, 0.5F}}),
                                     fingerprint({{step.adapter(other, "other"), 1}}),
                                     fingerprint({{b, 1}}),
                                     fingerprint({{a, 1}, {b, 1}}),
                                     fingerprint({{b, 1}, {again, 1}}),  // which is added last
                                     fingerprint({{a, 2}, {b, 1}}),
                                     AdapterMix{{{a, 1}, {b, 1}}, nullptr, {}, 1}.fingerprint(),
                                     AdapterMix{{{a, 1}, {b, 1}}, nullptr, {}, 2}.fingerprint()};
  for (const auto& x : different) CHECK(std::count(std::begin(different), std::end(different), x) == 1);
}

TEST_CASE("an adapter that does not fit its matrix is refused by its target") {
  const std::string q = "layers.0.attention.q: ";
  CHECK(contains(refusal([](Numbers& n) { n.target = "layers.9.attention.q"; }), "layers.9.attention.q"));
  for (const char* unknown : {"layers.1.experts.4.gate", "layers.0.experts.0.gate", "layers.-1.experts.0.up",
                              "layers.1.experts.0.side", "layers.99999999999.experts.0.up", ""}) {
    CHECK(contains(refusal([&](Numbers& n) { n.target = unknown; }), "has no matrix '"));
  }
  CHECK(contains(refusal([](Numbers& n) { n.gate.resize(2); }),
                 q + "gate: found 2 numbers, its shape needs 24"));
  CHECK(contains(refusal([](Numbers& n) { n.a.pop_back(); }), q + "A: found 47 numbers, its shape needs 48"));
  CHECK(contains(refusal([](Numbers& n) { n.b.push_back(0); }), q + "B: found 81 numbers"));
  CHECK(contains(refusal([](Numbers& n) { n.rank = 1000000; }), q + "rank 1000000"));
  CHECK(contains(refusal([](Numbers& n) { n.rows[2] = 40; }), q + "value 2 stands at [40, "));
  CHECK(contains(refusal([](Numbers& n) { n.cols[1] = -1; }), q + "value 1 stands at ["));
  CHECK(contains(refusal([](Numbers& n) { n.rows.pop_back(); }), q + "as many rows and columns"));
  CHECK(contains(refusal([](Numbers& n) {
                   n.rows[3] = n.rows[0];
                   n.cols[3] = n.cols[0];
                 }),
                 q + "two values stand at ["));
  CHECK(contains(refusal([](Numbers& n) { n.values[1] = std::nanf(""); }), q + "value 1 is not finite"));
  CHECK(contains(refusal([](Numbers& n) { n.a[5] = std::numeric_limits<float>::infinity(); }), q));
  CHECK(contains(refusal([](Numbers& n) { n.gain.resize(39); }), q + "gain: found 39 numbers"));
  CHECK(contains(refusal([](Numbers& n) { n.gain.assign(40, std::nanf("")); }), q + "gain 0 is not finite"));

  Step step(1);
  Random random(1);
  Numbers numbers = Numbers::low_rank(2, random);
  const AdapterSource source = numbers.source();
  const AdapterSource twice[] = {source, source};
  CHECK(contains(
      error_of(ErrorKind::invalid_argument, [&] { Adapter(step.targets, twice, step.budget, "twice"); }),
      q + "stands twice"));
}

TEST_CASE("experts have their shapes, whatever layers have none") {
  Targets targets;
  targets.add("output", {kWide, kInputs});
  targets.add_experts(1, 2, 8, 6);
  targets.add_experts(4, 3, 8, 5);
  const auto shape = [&](const std::string& name) {
    const Targets::Shape found = targets.shape(targets.find(name));
    return std::pair(found.rows, found.cols);
  };
  using Pair = std::pair<std::size_t, std::size_t>;
  CHECK(shape("output") == Pair(kWide, kInputs));
  CHECK(shape("layers.1.experts.0.gate") == Pair(6, 8));
  CHECK(shape("layers.1.experts.1.down") == Pair(8, 6));
  CHECK(shape("layers.4.experts.0.up") == Pair(5, 8));
  CHECK(shape("layers.4.experts.2.down") == Pair(8, 5));
  CHECK(targets.shape(targets.count()).rows == 0);
  for (const char* layer : {"0", "2", "3", "5"})
    static_cast<void>(error_of(ErrorKind::invalid_argument,
                               [&] { targets.find("layers." + std::string(layer) + ".experts.0.gate"); }));
}

TEST_CASE("weights that do not fit their matrix are refused by their target") {
  const auto refusal_of = [](const std::function<void(Numbers&)>& change) {
    Step step(1);
    Random random(1);
    Numbers numbers = Numbers::replaced({1, 5}, random);
    change(numbers);
    return error_of(ErrorKind::invalid_argument, [&] { step.adapter(numbers); });
  };
  CHECK(contains(refusal_of([](Numbers& n) { n.weights.pop_back(); }),
                 "weights: found 47 numbers, its shape needs 48"));
  CHECK(contains(refusal_of([](Numbers& n) { n.weight_rows = {5, 1}; }), "must ascend; 1 follows 5"));
  CHECK(contains(refusal_of([](Numbers& n) { n.weight_rows = {1, 40}; }),
                 "row 40 is given weights, allowed are 0 to 39"));
  CHECK(contains(refusal_of([](Numbers& n) { n.weight_rows = {-1, 4}; }), "row -1 is given weights"));
  CHECK(contains(refusal_of([](Numbers& n) { n.weights[3] = std::nanf(""); }), "layers.0.attention.q"));
  CHECK(contains(refusal_of([](Numbers& n) { n.shift.pop_back(); }), "shift: found 39 numbers"));
  CHECK(contains(refusal_of([](Numbers& n) { n.factor_scale = std::nanf(""); }), "not finite"));
}

TEST_CASE("an adapter's memory is the budget's, and comes back") {
  Step step(2);
  Random random(1);
  const std::uint64_t before = step.budget->used_bytes();
  {
    const auto made = step.adapter(Numbers::low_rank(16, random));
    CHECK(step.budget->used_bytes() - before == made->bytes());
    CHECK(made->bytes() > 16 * (kWide + kInputs) * sizeof(float));
  }
  CHECK(step.budget->used_bytes() == before);
  step.budget = std::make_shared<Budget>(1000);
  CHECK(contains(error_of(ErrorKind::budget, [&] { step.adapter(Numbers::low_rank(16, random), "big"); }),
                 "adapter big"));
  CHECK(step.budget->used_bytes() == 0);
}
