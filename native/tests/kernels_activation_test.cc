// Layer norm and the activations beside silu, of every table this processor runs, against double precision.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/kernels.h"
#include "kernels_support.h"

namespace edgert {
namespace {

constexpr std::size_t kLengths[] = {1, 2, 15, 16, 17, 31, 33, 200, 1000};

std::vector<float> front(const std::vector<float>& v, std::size_t n) {
  return {v.begin(), v.begin() + static_cast<std::ptrdiff_t>(n)};
}

TEST_CASE("layer_norm, in place as well") {
  Random random(7);
  for (std::string_view name : runnable_kernels()) {
    for (std::size_t n : kLengths) {
      CAPTURE(name);
      CAPTURE(n);
      std::vector<float> x = random_vector(n, 1, 5, random);
      const std::vector<float> weight = random_vector(n, -2, 2, random);
      const std::vector<float> bias = random_vector(n, -2, 2, random);
      double sum = 0, squares = 0;
      for (float v : x) sum += v;
      const double mean = sum / static_cast<double>(n);
      for (float v : x) squares += (v - mean) * (v - mean);
      const double scale = 1 / std::sqrt(squares / static_cast<double>(n) + 1e-5);
      std::vector<float> y(n);
      kernels(name).layer_norm(x.data(), weight.data(), bias.data(), n, 1e-5f, y.data());
      for (std::size_t i = 0; i < n; ++i)
        CHECK(std::fabs(y[i] - ((x[i] - mean) * scale * weight[i] + bias[i])) < 1e-5);
      kernels(name).layer_norm(x.data(), weight.data(), bias.data(), n, 1e-5f, x.data());
      CHECK(same_bits(x, y));
    }
  }
}

TEST_CASE("an rms_norm without weights has weights of one") {
  Random random(8);
  const std::vector<float> x = random_vector(37, -4, 4, random), ones(37, 1.0f);
  for (std::string_view name : runnable_kernels()) {
    CAPTURE(name);
    std::vector<float> with(37), without(37);
    kernels(name).rms_norm(x.data(), ones.data(), 37, 1e-5f, with.data());
    kernels(name).rms_norm(x.data(), nullptr, 37, 1e-5f, without.data());
    CHECK(same_bits(with, without));
  }
}

// Gates over the range where they count, ups on both sides of a limit of 7.
struct Inputs {
  std::vector<float> gates, ups;
  Inputs() {
    for (float g = -40.0f; g <= 40.0f; g += 0.0713f) {
      gates.push_back(g);
      ups.push_back(10 - g);
    }
  }
};

TEST_CASE("gelu_tanh_mul, the same bits wherever the vector ends") {
  const Inputs in;
  for (std::string_view name : runnable_kernels()) {
    CAPTURE(name);
    std::vector<float> all = in.gates;
    kernels(name).gelu_tanh_mul(all.data(), in.ups.data(), all.size());
    for (std::size_t i = 0; i < all.size(); ++i) {
      const double g = in.gates[i], u = in.ups[i];
      const double inner = std::sqrt(2 / 3.14159265358979) * (g + 0.044715 * g * g * g);
      CHECK(std::fabs(all[i] - 0.5 * g * (1 + std::tanh(inner)) * u) <= 1e-6 * std::fabs(g * u));
    }
    for (std::size_t n : kLengths) {
      std::vector<float> part = front(in.gates, n);
      kernels(name).gelu_tanh_mul(part.data(), in.ups.data(), n);
      CHECK(same_bits(part, front(all, n)));
    }
  }
}

TEST_CASE("clamped_swiglu, the same bits wherever the vector ends") {
  const Inputs in;
  for (std::string_view name : runnable_kernels()) {
    CAPTURE(name);
    const KernelTable& table = kernels(name);
    std::vector<float> all = in.gates;
    table.clamped_swiglu(all.data(), in.ups.data(), all.size(), 1.702f, 7);
    for (std::size_t i = 0; i < all.size(); ++i) {
      const double g = std::min<double>(in.gates[i], 7), u = in.ups[i];
      const double linear = (std::clamp(u, -7.0, 7.0) + 1) * g;
      CHECK(std::fabs(all[i] - linear / (1 + std::exp(-1.702 * g))) <= 1e-6 * std::fabs(linear));
    }
    for (std::size_t n : kLengths) {
      std::vector<float> part = front(in.gates, n);
      table.clamped_swiglu(part.data(), in.ups.data(), n, 1.702f, 7);
      CHECK(same_bits(part, front(all, n)));
    }
    std::vector<float> extremes = {-1e30f, 1e30f, std::numeric_limits<float>::infinity(),
                                   std::numeric_limits<float>::quiet_NaN()};
    const std::vector<float> ones(extremes.size(), 1.0f);
    table.clamped_swiglu(extremes.data(), ones.data(), extremes.size(), 1.702f, 7);
    CHECK(std::fabs(extremes[0]) < 1e-5f);
    CHECK(extremes[1] == extremes[2]);
    CHECK(std::isnan(extremes[3]));
  }
}

}  // namespace
}  // namespace edgert
