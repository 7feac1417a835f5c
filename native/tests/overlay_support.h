// Random adapters of a small matrix, and steps that they change, with their sums in double precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "adapters/overlay.h"
#include "kernels_support.h"
#include "model/linear.h"
#include "quant/pack.h"

namespace edgert::test {

inline constexpr std::size_t kInputs = 24;
inline constexpr std::size_t kWide = 40;    // rows of q: three tiles, the last of them not full
inline constexpr std::size_t kNarrow = 20;  // rows of v
inline constexpr std::size_t kMost = 16;    // rows of a step

inline std::shared_ptr<const Targets> some_targets() {
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
        overlay_(budget, 2 * std::max(rows, kMost), threads) {
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

}  // namespace edgert::test
