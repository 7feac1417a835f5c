// What adapters add to products, against sums in double precision, and who may notice it: nobody else.
#include "adapters/overlay.h"

#include <cmath>
#include <cstring>

#include "overlay_support.h"
#include "support.h"

using namespace edgert;
using test::error_of;
using test::kInputs;
using test::kWide;
using test::Numbers;
using test::Step;

namespace {

constexpr std::size_t kMixes = 12;

// A mix for each row: none, one, several, one twice as strong, one in the other order, and gated ones.
std::vector<AdapterMix> some_mixes(Step& step) {
  Random random(3);
  const auto lora = step.adapter(Numbers::low_rank(3, random));
  const auto half = step.adapter(Numbers::low_rank(17, random, SourceType::f16));
  const auto brain = step.adapter(Numbers::low_rank(1, random, SourceType::bf16));
  const auto shira = step.adapter(Numbers::sparse(60, random));
  const auto ia3 = step.adapter(Numbers::gains(random, false));
  Numbers both = Numbers::low_rank(4, random);
  both.gain = random_vector(kWide, -0.5F, 0.5F, random);
  both.gain_spares_bias = true;
  both.factor_scale = 0.75F;
  const auto dora = step.adapter(both);
  const auto whole = step.adapter(Numbers::replaced({}, random, SourceType::bf16));
  const auto some = step.adapter(Numbers::replaced({0, 3, 15, 16, 39}, random));
  std::vector<AdapterMix::Entry> gated;
  for (Numbers numbers :
       {Numbers::low_rank(2, random), Numbers::sparse(50, random), Numbers::gains(random, false)}) {
    numbers.gate = random_vector(kInputs, -1, 1, random);
    gated.push_back({step.adapter(numbers), 1.5F});
  }
  return {{},
          {{{lora, 1}}},
          {{{lora, 2}, {half, 0.5F}}},
          {{{half, 0.5F}, {lora, 2}}},
          {{{brain, -1}, {shira, 1}}},
          {{{ia3, 1}}},
          {{{dora, 1}, {ia3, 0.25F}, {shira, 3}}},
          {{{shira, 0}}},
          {{{whole, 1}}},
          {{{some, 0.5F}, {lora, 1}, {whole, 0.25F}}},
          {gated, nullptr, {}, 1},
          {gated, nullptr, {}, 2}};
}

bool same_row(const std::vector<float>& a, std::size_t i, const std::vector<float>& b, std::size_t j) {
  return std::memcmp(&a[i * Step::kBoth], &b[j * Step::kBoth], Step::kBoth * sizeof(float)) == 0;
}

}  // namespace

TEST_CASE("what adapters add is what sums in double precision say, on every instruction set") {
  for (const std::string_view isa : runnable_kernels()) {
    CAPTURE(isa);
    Step step(kMixes, isa);
    const auto mixes = some_mixes(step);
    const auto y = step.run(mixes);
    for (std::size_t row = 0; row < kMixes; ++row) {
      CAPTURE(row);
      const auto expected = step.expected(row, mixes[row]);
      for (std::size_t i = 0; i < Step::kBoth; ++i)
        CHECK(std::abs(y[row * Step::kBoth + i] - expected[i]) < 2e-5);
    }
  }
}

TEST_CASE("a row's bits do not depend on its neighbours, their adapters or the threads") {
  Step step(kMixes);
  const auto mixes = some_mixes(step);
  const auto y = step.run(mixes);
  for (std::size_t row = 0; row < kMixes; ++row) {
    const auto own = static_cast<std::int32_t>(row);
    CHECK(same_row(step.run(mixes, {own}), 0, y, row));
    CHECK(same_row(step.run(mixes, {7, own, 3, 2, own, 1}), 4, y, row));
  }
  CHECK(same_row(y, 2, y, 2));
  for (const int threads : {2, 3}) {
    Step spread(kMixes, "", threads);
    CHECK(same_bits(spread.run(some_mixes(spread)), y));
  }
}

TEST_CASE("a gated mix does not notice how many other adapters a step has") {
  constexpr std::size_t kRows = 160;
  Random random(5);
  Step step(kRows);
  const auto with_gate = [&](Numbers numbers) {
    numbers.gate = random_vector(kInputs, -1, 1, random);
    return step.adapter(numbers);
  };
  const AdapterMix gated{
      {{with_gate(Numbers::gains(random, false)), 1}, {with_gate(Numbers::gains(random, false)), 1}},
      nullptr,
      {},
      1};
  std::vector<AdapterMix> mixes(kRows);
  for (std::size_t row = 0; row < kRows; ++row) {
    mixes[row] = row % 32 == 7 ? gated : AdapterMix{{{step.adapter(Numbers::gains(random, false)), 1}}};
  }
  const auto y = step.run(mixes);
  for (std::size_t row = 0; row < kRows; ++row) {
    const auto expected = step.expected(row, mixes[row]);
    for (std::size_t i = 0; i < Step::kBoth; ++i)
      CHECK(std::abs(y[row * Step::kBoth + i] - expected[i]) < 2e-5);
  }
}

TEST_CASE("a row without adapters, or with a scale of 0, has the bits of the weights alone") {
  Step step(8);
  const auto mixes = some_mixes(step);
  const auto plain = step.run({AdapterMix{}});
  const auto y = step.run(mixes);
  for (const std::size_t row : {std::size_t{0}, std::size_t{7}}) CHECK(same_row(y, row, plain, row));
  for (std::size_t row = 1; row < 7; ++row) CHECK_FALSE(same_row(y, row, plain, row));
  CHECK(same_bits(step.run({AdapterMix{}}), plain));  // and nothing is left of them
}

TEST_CASE("the order in which a mix names its adapters changes no bit") {
  Step step(8);
  const auto mixes = some_mixes(step);
  const auto one = step.run({mixes[2]});
  CHECK(same_bits(step.run({mixes[3]}), one));
}

TEST_CASE("room for mixes that are gone is given back") {
  Random random(8);
  Step step(3);
  const auto one = step.adapter(Numbers::low_rank(2, random));
  const std::uint64_t before = step.budget->used_bytes();
  {
    const auto kept = step.reserve({{{one, 1}}});
    step.trim();
    CHECK(step.budget->used_bytes() > before);
  }
  step.trim();
  CHECK(step.budget->used_bytes() == before);
}

TEST_CASE("a mix that does not fit takes nothing from those that do") {
  Random random(8);
  Step step(3);
  const AdapterMix small{{{step.adapter(Numbers::low_rank(2, random), "small"), 1}}};
  const AdapterMix big{{{step.adapter(Numbers::low_rank(256, random), "big"), 1}}};
  const auto expected = step.run({small});
  step.budget->hold(step.budget->available_bytes() - 1000);
  static_cast<void>(error_of(ErrorKind::budget, [&] { step.run({big}); }));
  CHECK(step.run({small}) == expected);
}
