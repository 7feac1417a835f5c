// Convolutions and the gated delta rule of every table this processor runs, against double precision.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "kernels/kernels.h"
#include "kernels_support.h"
#include "quant/pack.h"

namespace edgert {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

void check_near(float value, double expected, double tolerance) {
  CHECK_MESSAGE(std::fabs(value - expected) <= tolerance * (1 + std::fabs(expected)),
                value << " instead of " << expected);
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// --- convolution --------------------------------------------------------------------------------------

struct ConvolutionCase {
  std::size_t channels, stride;
  int rows, width;
  bool silu, biased;
  std::vector<float> x, weights, bias, packed;

  ConvolutionCase(std::size_t count, int kernel, bool activated, Random& random)
      : channels(count), stride(count + 3), rows(9), width(kernel), silu(activated), biased(activated) {
    const auto taps = static_cast<std::size_t>(width);
    x = random_vector(static_cast<std::size_t>(rows) * stride, -2, 2, random);
    weights = random_vector(channels * taps, -1, 1, random);
    bias = random_vector(channels, -1, 1, random);
    packed.assign((channels + 15) / 16 * 16 * taps, 0.0f);
    for (std::size_t c = 0; c < channels; ++c) {
      for (std::size_t k = 0; k < taps; ++k)
        packed[c / 16 * 16 * taps + k * 16 + c % 16] = weights[c * taps + k];
    }
  }
  double at(std::size_t row, std::size_t channel) const {
    double sum = biased ? bias[channel] : 0;
    for (int k = 0; k < width; ++k) {
      const auto from = static_cast<std::ptrdiff_t>(row) - (width - 1) + k;
      if (from < 0) continue;
      sum += static_cast<double>(
                 weights[channel * static_cast<std::size_t>(width) + static_cast<std::size_t>(k)]) *
             x[static_cast<std::size_t>(from) * stride + channel];
    }
    return silu ? sum * sigmoid(sum) : sum;
  }
  // Rows in calls of `step`, each continuing the one before.
  std::vector<float> run(const KernelTable& table, int step) const {
    std::vector<float> y(static_cast<std::size_t>(rows) * channels, kNan);
    std::vector<float> history(static_cast<std::size_t>(width - 1) * channels, kNan);
    for (int first = 0; first < rows; first += step) {
      Convolution work;
      work.x = x.data() + static_cast<std::size_t>(first) * stride;
      work.x_stride = stride;
      work.rows = std::min(step, rows - first);
      work.width = width;
      work.channels = channels;
      work.weights = packed.data();
      work.bias = biased ? bias.data() : nullptr;
      work.silu = silu;
      work.history = first == 0 ? nullptr : history.data();
      work.next_history = history.data();
      work.y = y.data() + static_cast<std::size_t>(first) * channels;
      work.y_stride = channels;
      const std::size_t strips = (channels + 15) / 16;
      table.convolution(work, 0, strips / 2);
      table.convolution(work, strips / 2, strips);
    }
    return y;
  }
};

TEST_CASE("convolution, the same bits however the rows are cut") {
  Random random(1);
  for (std::string_view name : runnable_kernels()) {
    for (std::size_t channels : {1u, 15u, 16u, 33u, 72u}) {
      for (int width = 2; width <= kMaxConvolution; ++width) {
        CAPTURE(name);
        CAPTURE(channels);
        CAPTURE(width);
        const ConvolutionCase example(channels, width, width % 2 == 0, random);
        const std::vector<float> y = example.run(kernels(name), example.rows);
        for (std::size_t r = 0; r < static_cast<std::size_t>(example.rows); ++r) {
          for (std::size_t c = 0; c < channels; ++c) check_near(y[r * channels + c], example.at(r, c), 1e-6);
        }
        for (int step : {1, 2, 4}) CHECK(same_bits(example.run(kernels(name), step), y));
      }
    }
  }
}

// --- the gated delta rule -----------------------------------------------------------------------------

struct DeltaCase {
  std::size_t key_dim, value_dim, stride;
  int rows = 7;
  std::vector<float> keys, queries, values, gates;  // gates: decay and beta by turns

  DeltaCase(std::size_t k, std::size_t v, Random& random) : key_dim(k), value_dim(v), stride(k + v) {
    const auto n = static_cast<std::size_t>(rows);
    const float unit = 1 / std::sqrt(static_cast<float>(k));
    keys = random_vector(n * stride, -unit, unit, random);
    queries = random_vector(n * stride, -unit, unit, random);
    values = random_vector(n * stride, -2, 2, random);
    gates = random_vector(n * 2, 0.1f, 1, random);
  }
  std::vector<double> expected() const {
    std::vector<double> state(key_dim * value_dim), out;
    for (std::size_t r = 0; r < static_cast<std::size_t>(rows); ++r) {
      for (double& s : state) s *= gates[2 * r];
      for (std::size_t i = 0; i < value_dim; ++i) {
        double remembered = 0, sum = 0;
        for (std::size_t k = 0; k < key_dim; ++k)
          remembered += state[k * value_dim + i] * keys[r * stride + k];
        const double delta = gates[2 * r + 1] * (values[r * stride + i] - remembered);
        for (std::size_t k = 0; k < key_dim; ++k) {
          state[k * value_dim + i] += keys[r * stride + k] * delta;
          sum += state[k * value_dim + i] * queries[r * stride + k];
        }
        out.push_back(sum);
      }
    }
    return out;
  }
  // Rows in calls of `step`; `apart`: from one copy of the state to another, as a step begins.
  std::vector<float> run(const KernelTable& table, int step, bool apart) const {
    std::vector<float> out(static_cast<std::size_t>(rows) * value_dim, kNan);
    const std::size_t size = delta_state_floats(static_cast<int>(key_dim), static_cast<int>(value_dim));
    std::vector<float> before(size, kNan), state(size, kNan);
    for (int first = 0; first < rows; first += step) {
      const auto at = static_cast<std::size_t>(first);
      if (apart) std::swap(before, state);
      DeltaRule work;
      work.queries = queries.data() + at * stride;
      work.keys = keys.data() + at * stride;
      work.values = values.data() + at * stride;
      work.row_stride = stride;
      work.decay = gates.data() + 2 * at;
      work.beta = work.decay + 1;
      work.gate_stride = 2;
      work.rows = std::min(step, rows - first);
      work.key_dim = static_cast<int>(key_dim);
      work.value_dim = static_cast<int>(value_dim);
      if (first != 0) work.state = apart ? before.data() : state.data();
      work.next_state = state.data();
      work.out = out.data() + at * value_dim;
      work.out_stride = value_dim;
      table.delta_rule(work);
    }
    return out;
  }
};

TEST_CASE("the gated delta rule, the same bits however the rows are cut") {
  Random random(2);
  for (std::string_view name : runnable_kernels()) {
    for (std::size_t key_dim : {1u, 3u, 8u, 20u, 128u}) {
      for (std::size_t value_dim : {1u, 16u, 24u, 128u}) {
        CAPTURE(name);
        CAPTURE(key_dim);
        CAPTURE(value_dim);
        const DeltaCase example(key_dim, value_dim, random);
        const std::vector<float> out = example.run(kernels(name), example.rows, false);
        const std::vector<double> expected = example.expected();
        for (std::size_t i = 0; i < out.size(); ++i) check_near(out[i], expected[i], 3e-6);
        for (int step : {1, 3}) {
          CHECK(same_bits(example.run(kernels(name), step, false), out));
          CHECK(same_bits(example.run(kernels(name), step, true), out));
        }
      }
    }
  }
}

TEST_CASE("sigmoid_mul") {
  Random random(3);
  for (std::string_view name : runnable_kernels()) {
    for (std::size_t n : {1u, 17u, 200u}) {
      CAPTURE(name);
      const std::vector<float> x = random_vector(n, -3, 3, random), gate = random_vector(n, -30, 30, random);
      std::vector<float> y = x;
      kernels(name).sigmoid_mul(y.data(), gate.data(), n);
      for (std::size_t i = 0; i < n; ++i) check_near(y[i], x[i] * sigmoid(gate[i]), 1e-6);
    }
  }
}

}  // namespace
}  // namespace edgert
