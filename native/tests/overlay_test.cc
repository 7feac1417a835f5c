// What adapters add to products, against sums in double precision, and who may notice it: nobody else.
#include "adapters/overlay.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>

#include "kernels_support.h"
#include "model/linear.h"
#include "quant/pack.h"
#include "support.h"

using namespace edgert;
using test::contains;
using test::error_of;

namespace {

constexpr std::size_t kInputs = 24;
constexpr std::size_t kWide = 40;    // rows of q: three tiles, the last of them not full
constexpr std::size_t kNarrow = 20;  // rows of v
constexpr std::size_t kMost = 16;    // rows of a step
constexpr std::size_t kMixes = 12;   // of some_mixes()

std::shared_ptr<const Targets> some_targets() {
  Targets targets;
  targets.add("layers.0.attention.q", {kWide, kInputs});
  targets.add("layers.0.attention.v", {kNarrow, kInputs});
  targets.add_experts(1, 4, kInputs, 18);
  return std::make_shared<const Targets>(std::move(targets));
}

// The numbers of an adapter, which AdapterSource only borrows.
struct Numbers {
  std::string target = "layers.0.attention.q";
  std::size_t outputs = kWide;
  std::size_t inputs = kInputs;
  SourceType type = SourceType::f32;
  std::size_t rank = 0;
  std::vector<float> a, b, values, gain;
  std::vector<std::int32_t> rows, cols;
  bool gain_spares_bias = false;
  std::vector<float> shift, weights;
  std::vector<std::int32_t> weight_rows;
  std::vector<float> gate;
  float factor_scale = 1;
  std::vector<std::byte> packed_a, packed_b, packed_weights;

  static Numbers low_rank(std::size_t rank, Random& random, SourceType type = SourceType::f32) {
    Numbers n;
    n.type = type;
    n.rank = rank;
    n.a = random_vector(rank * n.inputs, -1, 1, random);
    n.b = random_vector(rank * n.outputs, -1, 1, random);
    return n;
  }
  static Numbers sparse(std::size_t count, Random& random) {
    Numbers n;
    n.values = random_vector(count, -1, 1, random);
    for (std::size_t i = 0; i < count; ++i) {  // no two at one place, and in no order
      const auto place = static_cast<std::int32_t>((i * 7919) % (kWide * kInputs));
      n.rows.push_back(place / static_cast<std::int32_t>(kInputs));
      n.cols.push_back(place % static_cast<std::int32_t>(kInputs));
    }
    return n;
  }
  static Numbers gains(Random& random, bool spares_bias) {
    Numbers n;
    n.gain = random_vector(kWide, -0.5F, 0.5F, random);
    n.gain_spares_bias = spares_bias;
    return n;
  }

  // Rows in place of the matrix' own; all of them where none is named.
  static Numbers replaced(std::vector<std::int32_t> rows, Random& random, SourceType type = SourceType::f32) {
    Numbers n;
    n.type = type;
    n.weights = random_vector((rows.empty() ? kWide : rows.size()) * kInputs, -1, 1, random);
    n.weight_rows = std::move(rows);
    n.shift = random_vector(kWide, -1, 1, random);
    return n;
  }

  AdapterSource source() {
    packed_weights = encode(weights);
    packed_a = encode(a);
    packed_b = encode(b);
    AdapterSource source;
    source.target = target;
    source.type = type;
    source.rank = rank;
    source.a = packed_a;
    source.b = packed_b;
    source.rows = rows;
    source.cols = cols;
    source.values = values;
    source.gain = gain;
    source.gain_spares_bias = gain_spares_bias;
    source.shift = shift;
    source.weights = packed_weights;
    source.weight_rows = weight_rows;
    source.gate = gate;
    source.factor_scale = factor_scale;
    return source;
  }

 private:
  // And rounds the numbers as they are stored.
  std::vector<std::byte> encode(std::vector<float>& numbers) const {
    std::vector<std::byte> out(numbers.size() * source_bytes(type));
    for (std::size_t i = 0; i < numbers.size(); ++i) {
      if (type == SourceType::f32) {
        std::memcpy(out.data() + i * 4, &numbers[i], 4);
        continue;
      }
      const bool half = type == SourceType::f16;
      const std::uint16_t bits = half ? float_to_half(numbers[i]) : float_to_bfloat(numbers[i]);
      numbers[i] = half ? half_to_float(bits) : bfloat_to_float(bits);
      std::memcpy(out.data() + i * 2, &bits, 2);
    }
    return out;
  }
};

// A step's products of two matrices with the same rows, of which adapters change the first.
class Step {
 public:
  explicit Step(std::size_t rows, std::string_view isa = "", int threads = 1)
      : rows_(rows),
        pool_(threads),
        kernels_(isa.empty() ? kernels() : kernels(isa)),
        overlay_(budget, 2 * kMost, threads) {
    Random random(7);
    q_ = random_vector(kWide * kInputs, -1, 1, random);
    v_ = random_vector(kNarrow * kInputs, -1, 1, random);
    bias_ = random_vector(kWide, -1, 1, random);
    x_ = random_vector(rows * kInputs, -1, 1, random);
    packed_q_ = pack(q_, kWide);
    packed_v_ = pack(v_, kNarrow);
  }

  std::shared_ptr<const Adapter> adapter(Numbers numbers, const std::string& name = "one") {
    const AdapterSource source = numbers.source();
    auto made = std::make_shared<const Adapter>(targets, std::span(&source, 1), budget, name);
    numbers_.push_back(std::move(numbers));
    of_.push_back(made.get());
    return made;
  }

  std::shared_ptr<const AdapterMix> reserve(AdapterMix mix) {
    auto shared = std::make_shared<const AdapterMix>(std::move(mix));
    overlay_.reserve(shared);
    return shared;
  }
  void trim() { overlay_.trim(); }

  // [rows][kWide + kNarrow]; `order`: the rows of the batch, each an activation row.
  std::vector<float> run(const std::vector<AdapterMix>& mixes, std::vector<std::int32_t> order = {}) {
    for (const AdapterMix& mix : mixes) reserve(mix);
    if (order.empty()) {
      for (std::size_t i = 0; i < rows_; ++i) order.push_back(static_cast<std::int32_t>(i));
    }
    std::vector<float> x;
    std::vector<const AdapterMix*> of_rows;
    for (const std::int32_t row : order) {
      const auto from = x_.begin() + static_cast<std::ptrdiff_t>(row) * static_cast<std::ptrdiff_t>(kInputs);
      x.insert(x.end(), from, from + kInputs);
      const auto& mix = mixes[static_cast<std::size_t>(row) % mixes.size()];
      of_rows.push_back(mix.entries.empty() ? nullptr : &mix);
    }
    overlay_.begin(of_rows);
    const Activations in{x.data(), kInputs, order.size(), {}};
    std::vector<float> y(order.size() * kBoth);
    const Matrix q{FormatId::f32, kWide, kInputs, packed_q_.data(), targets->find("layers.0.attention.q")};
    const Matrix v{FormatId::f32, kNarrow, kInputs, packed_v_.data(), targets->find("layers.0.attention.v")};
    multiply({pool_, kernels_, &overlay_},
             {product(q, in, y.data(), kBoth, bias_.data()), product(v, in, y.data() + kWide, kBoth)});
    return y;
  }

  // Of one row, in double precision: gains first, then sums, each in the order of the adapters' making.
  std::vector<double> expected(std::size_t row, const AdapterMix& mix) const {
    std::vector<double> y;
    const float* x = x_.data() + row * kInputs;
    for (std::size_t r = 0; r < kWide; ++r) y.push_back(bias_[r] + dot(&q_[r * kInputs], x, kInputs));
    for (std::size_t r = 0; r < kNarrow; ++r) y.push_back(dot(&v_[r * kInputs], x, kInputs));
    const auto all = numbers(mix, x);
    for (const auto& [n, scale] : all) {
      for (std::size_t i = 0; i < n->weights.size() / kInputs; ++i) {
        const auto r = n->weight_rows.empty() ? i : static_cast<std::size_t>(n->weight_rows[i]);
        y[r] += scale * (dot(&n->weights[i * kInputs], x, kInputs) + bias_[r] - y[r]);
      }
    }
    for (const auto& [n, scale] : all) {
      for (std::size_t r = 0; r < n->gain.size(); ++r)
        y[r] += scale * n->gain[r] * (y[r] - (n->gain_spares_bias ? bias_[r] : 0));
    }
    for (const auto& [n, scale] : all) {
      for (std::size_t k = 0; k < n->rank; ++k) {
        const double inner = dot(&n->a[k * kInputs], x, kInputs);
        for (std::size_t r = 0; r < kWide; ++r)
          y[r] += scale * n->factor_scale * n->b[r * n->rank + k] * inner;
      }
      for (std::size_t i = 0; i < n->values.size(); ++i)
        y[static_cast<std::size_t>(n->rows[i])] += scale * n->values[i] * x[n->cols[i]];
      for (std::size_t r = 0; r < n->shift.size(); ++r) y[r] += scale * n->shift[r];
    }
    return y;
  }

  static constexpr std::size_t kBoth = kWide + kNarrow;
  std::shared_ptr<Budget> budget = std::make_shared<Budget>(1 << 24);
  std::shared_ptr<const Targets> targets = some_targets();

 private:
  static std::vector<std::byte> pack(const std::vector<float>& weights, std::size_t rows) {
    std::vector<std::byte> out(packed_bytes(format(FormatId::f32), rows, kInputs));
    pack_matrix(format(FormatId::f32), SourceType::f32, std::as_bytes(std::span(weights)), rows, kInputs, out,
                {}, 1);
    return out;
  }
  static double dot(const float* a, const float* b, std::size_t n) {
    double sum = 0;
    for (std::size_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * b[i];
    return sum;
  }
  // With what each is multiplied by: its scale, and its share of the row where the mix is gated.
  std::vector<std::pair<const Numbers*, double>> numbers(const AdapterMix& mix, const float* x) const {
    std::vector<std::pair<const Numbers*, double>> out;
    for (std::size_t i = 0; i < of_.size(); ++i) {
      for (const auto& entry : mix.entries) {
        if (entry.adapter.get() == of_[i]) out.emplace_back(&numbers_[i], entry.scale);
      }
    }
    if (mix.top_k == 0) return out;
    std::vector<std::pair<double, std::size_t>> scores;
    for (std::size_t i = 0; i < out.size(); ++i) {
      const auto gate = standardised(out[i].first->gate.data()), input = standardised(x);
      double score = 0;
      for (std::size_t c = 0; c < kInputs; ++c) score += gate[c] * input[c];
      scores.emplace_back(score / std::sqrt(kInputs), i);
    }
    std::sort(scores.rbegin(), scores.rend());
    double sum = 0;
    for (std::size_t n = 0; n < scores.size(); ++n) sum += n < mix.top_k ? std::exp(scores[n].first) : 0;
    for (std::size_t n = 0; n < scores.size(); ++n)
      out[scores[n].second].second *= n < mix.top_k ? std::exp(scores[n].first) / sum : 0;
    return out;
  }
  static std::vector<double> standardised(const float* x) {
    const double mean = std::accumulate(x, x + kInputs, 0.0) / kInputs;
    double squares = 0;
    for (std::size_t i = 0; i < kInputs; ++i) squares += (x[i] - mean) * (x[i] - mean);
    std::vector<double> out;
    for (std::size_t i = 0; i < kInputs; ++i)
      out.push_back((x[i] - mean) / std::sqrt(squares / kInputs + 1e-5));
    return out;
  }

  const std::size_t rows_;
  ThreadPool pool_;
  const KernelTable& kernels_;
  Overlay overlay_;
  std::vector<float> q_, v_, bias_, x_;
  std::vector<std::byte> packed_q_, packed_v_;
  std::vector<Numbers> numbers_;
  std::vector<const Adapter*> of_;
};

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
