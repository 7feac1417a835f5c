// Norms, activations, softmax and attention of every table this processor runs, against double precision.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "kernels/kernels.h"
#include "kernels_support.h"
#include "quant/pack.h"

namespace edgert {
namespace {

constexpr std::size_t kLengths[] = {1, 2, 15, 16, 17, 31, 33, 200, 1000};
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

void check_relative(float value, double expected, double tolerance) {
  CHECK_MESSAGE(std::fabs(value - expected) <= tolerance * std::fabs(expected) + 1e-37,
                value << " instead of " << expected);
}

TEST_CASE("rms_norm, in place as well") {
  Random random(1);
  for (std::string_view name : runnable_kernels()) {
    for (std::size_t n : kLengths) {
      CAPTURE(name);
      CAPTURE(n);
      std::vector<float> x = random_vector(n, -4, 4, random);
      const std::vector<float> weight = random_vector(n, -2, 2, random);
      double squares = 0;
      for (float v : x) squares += static_cast<double>(v) * v;
      const double scale = 1 / std::sqrt(squares / static_cast<double>(n) + 1e-5);
      std::vector<float> y(n);
      kernels(name).rms_norm(x.data(), weight.data(), n, 1e-5f, y.data());
      for (std::size_t i = 0; i < n; ++i) check_relative(y[i], scale * x[i] * weight[i], 2e-6);
      kernels(name).rms_norm(x.data(), weight.data(), n, 1e-5f, x.data());
      CHECK(same_bits(x, y));
    }
  }
}

TEST_CASE("silu_mul over the whole range, the same bits wherever the vector ends") {
  std::vector<float> gates, ups;
  for (float g = -86.0f; g <= 90.0f; g += 0.173f) {
    gates.push_back(g);
    ups.push_back(g + 0.5f);
  }
  for (std::string_view name : runnable_kernels()) {
    CAPTURE(name);
    std::vector<float> all = gates;
    kernels(name).silu_mul(all.data(), ups.data(), all.size());
    for (std::size_t i = 0; i < all.size(); ++i) {
      const double g = gates[i];
      check_relative(all[i], g / (1 + std::exp(-g)) * ups[i], 1e-6);
    }
    for (std::size_t n : kLengths) {
      std::vector<float> part(gates.begin(), gates.begin() + static_cast<std::ptrdiff_t>(n));
      kernels(name).silu_mul(part.data(), ups.data(), n);
      CHECK(same_bits(part, {all.begin(), all.begin() + static_cast<std::ptrdiff_t>(n)}));
    }
    std::vector<float> extremes = {-1e30f, -200, -90, -0.0f, 0, 200, 1e30f, kInf, kNan};
    const std::vector<float> ones(extremes.size(), 1.0f);
    kernels(name).silu_mul(extremes.data(), ones.data(), extremes.size());
    for (std::size_t i : {0u, 1u, 2u}) CHECK(std::fabs(extremes[i]) < 1e-35f);
    CHECK(extremes[3] == 0);
    CHECK(extremes[4] == 0);
    CHECK(extremes[5] == 200);
    CHECK(extremes[6] == 1e30f);
    CHECK(extremes[7] == kInf);
    CHECK(std::isnan(extremes[8]));
  }
}

TEST_CASE("softmax") {
  Random random(2);
  for (std::string_view name : runnable_kernels()) {
    for (std::size_t n : kLengths) {
      for (float range : {0.01f, 5.0f, 80.0f}) {
        CAPTURE(name);
        CAPTURE(n);
        const std::vector<float> x = random_vector(n, -range, range, random);
        double largest = x[0], sum = 0;
        for (float v : x) largest = std::max<double>(largest, v);
        for (float v : x) sum += std::exp(static_cast<double>(v - static_cast<float>(largest)));
        std::vector<float> y = x;
        kernels(name).softmax(y.data(), n);
        for (std::size_t i = 0; i < n; ++i) {
          const double shifted =
              x[i] - static_cast<float>(largest);  // rounded to float, as the kernel sees it
          check_relative(y[i], std::exp(shifted) / sum, 1.5e-6);
        }
      }
    }
    std::vector<float> far = {0, -kInf, -1000, 1000, -kInf};
    kernels(name).softmax(far.data(), far.size());
    CHECK(far == std::vector<float>{0, 0, 0, 1, 0});
    std::vector<float> bad = {0, kNan, 1};
    kernels(name).softmax(bad.data(), bad.size());
    for (float v : bad) CHECK(std::isnan(v));
  }
}

// What int8 codes say: groups of 32, each with a scale of max |x| / 127, for keys rounded to f16 afterwards.
std::vector<float> through_int8(std::vector<float> x, bool half_scale) {
  for (std::size_t begin = 0; begin < x.size(); begin += 32) {
    const std::size_t end = std::min(begin + 32, x.size());
    float largest = 0;
    for (std::size_t i = begin; i < end; ++i) largest = std::max(largest, std::fabs(x[i]));
    const float scale = largest / 127;
    const float stored = half_scale ? half_to_float(float_to_half(scale)) : scale;
    for (std::size_t i = begin; i < end; ++i) x[i] = std::nearbyint(x[i] / scale) * stored;
  }
  return x;
}

// A sequence's keys and values in blocks full of NaN, but for the tokens stored.
struct Cache {
  int head_dim, value_dim;
  KvType type;
  std::vector<std::vector<float>> keys, values;  // as stored, [token][dim]
  std::vector<std::vector<std::byte>> storage;
  std::vector<const std::byte*> blocks;
  std::size_t key_offset = 64, value_offset;

  Cache(const KernelTable& table, int heads, int values_dim, KvType kv_type, int tokens, Random& random)
      : head_dim(heads), value_dim(values_dim), type(kv_type) {
    value_offset = key_offset + kv_key_bytes(type, head_dim);
    const std::size_t bytes = value_offset + kv_value_bytes(type, value_dim);
    for (int t = 0; t < tokens; ++t) {
      if (t % 16 == 0) storage.emplace_back(bytes, std::byte{0xff});  // NaN in either type
      keys.push_back(random_vector(static_cast<std::size_t>(head_dim), -2, 2, random));
      values.push_back(random_vector(static_cast<std::size_t>(value_dim), -2, 2, random));
      table.store_kv(keys.back().data(), values.back().data(), head_dim, value_dim, type, t % 16,
                     storage.back().data() + key_offset, storage.back().data() + value_offset);
      if (type == KvType::f16) {
        for (float& v : keys.back()) v = half_to_float(float_to_half(v));
        for (float& v : values.back()) v = half_to_float(float_to_half(v));
      } else if (type == KvType::int8) {
        keys.back() = through_int8(keys.back(), true);
        values.back() = through_int8(values.back(), false);
      }
    }
    for (const auto& block : storage) blocks.push_back(block.data());
  }
};

// Of `rows` rows, [rows][group][value_dim]; the first attends to [begin, end), each other to a window as long
// that ends one position later.
std::vector<float> attend(const KernelTable& table, const Cache& cache, std::span<const float> queries,
                          int group, std::int64_t begin, std::int64_t end, int rows = 1,
                          const float* sinks = nullptr, std::int64_t start = 0) {
  Attention work;
  work.queries = queries.data();
  work.query_stride = static_cast<std::size_t>(group * cache.head_dim);
  work.rows = rows;
  work.group = group;
  work.head_dim = cache.head_dim;
  work.value_dim = cache.value_dim;
  work.kv_type = cache.type;
  work.blocks = cache.blocks.data();
  work.key_offset = cache.key_offset;
  work.value_offset = cache.value_offset;
  work.end = end;
  work.window = begin == 0 ? 0 : end - begin;
  work.start = start;
  work.sinks = sinks;
  std::vector<float> scratch(attention_scratch(work), kNan);
  std::vector<float> out(static_cast<std::size_t>(rows * group * cache.value_dim), kNan);
  work.scratch = scratch.data();
  work.out = out.data();
  work.out_stride = static_cast<std::size_t>(group * cache.value_dim);
  table.attention(work);
  return out;
}

void check_attention(const Cache& cache, const std::vector<float>& queries, int group, std::int64_t begin,
                     std::int64_t end, const std::vector<float>& out) {
  const auto head_dim = static_cast<std::size_t>(cache.head_dim);
  const auto value_dim = static_cast<std::size_t>(cache.value_dim);
  for (std::size_t head = 0; head < static_cast<std::size_t>(group); ++head) {
    const auto from = queries.begin() + static_cast<std::ptrdiff_t>(head * head_dim);
    std::vector<float> query(from, from + static_cast<std::ptrdiff_t>(head_dim));
    if (cache.type == KvType::int8) query = through_int8(query, false);
    std::vector<double> expected(value_dim, 0.0);
    double sum = 0;
    for (auto t = static_cast<std::size_t>(begin); t < static_cast<std::size_t>(end); ++t) {
      double score = 0;
      for (std::size_t d = 0; d < head_dim; ++d) {
        score += static_cast<double>(query[d]) * cache.keys[t][d];
      }
      sum += std::exp(score);
      for (std::size_t i = 0; i < value_dim; ++i) expected[i] += std::exp(score) * cache.values[t][i];
    }
    for (std::size_t i = 0; i < value_dim; ++i) {
      CHECK(std::fabs(out[head * value_dim + i] - expected[i] / sum) < 1e-5);
    }
  }
}

TEST_CASE("attention sees exactly the positions of its window, whatever lies beside them") {
  struct Shape {
    int group, head_dim, value_dim;
  };
  struct Window {
    std::int64_t begin, end;
  };
  Random random(3);
  for (std::string_view name : runnable_kernels()) {
    const KernelTable& table = kernels(name);
    for (KvType type : {KvType::f32, KvType::f16, KvType::int8}) {
      for (Shape shape : {Shape{1, 1, 1}, Shape{3, 7, 5}, Shape{2, 64, 64}, Shape{7, 80, 96},
                          Shape{8, 129, 33}, Shape{1, 512, 128}}) {
        CAPTURE(name);
        CAPTURE(shape.head_dim);
        const Cache cache(table, shape.head_dim, shape.value_dim, type, 70, random);
        const auto queries =
            random_vector(static_cast<std::size_t>(shape.group * shape.head_dim), -0.3f, 0.3f, random);
        for (Window window : {Window{0, 1}, Window{0, 16}, Window{0, 70}, Window{5, 9}, Window{15, 17},
                              Window{16, 33}, Window{30, 64}, Window{69, 70}}) {
          CAPTURE(window.begin);
          CAPTURE(window.end);
          const auto out = attend(table, cache, queries, shape.group, window.begin, window.end);
          check_attention(cache, queries, shape.group, window.begin, window.end, out);
        }
      }
    }
  }
}

TEST_CASE("a sink takes its share of the softmax, and a start hides what lies before it") {
  Random random(9);
  constexpr int kGroup = 3, kDim = 24, kRows = 5;
  constexpr std::size_t kRow = kGroup * kDim;
  constexpr std::int64_t kStart = 37, kEnd = 60;
  const float sinks[kGroup] = {-2, 1, 30};
  KvType type{};
  SUBCASE("f32") { type = KvType::f32; }
  SUBCASE("f16") { type = KvType::f16; }
  SUBCASE("int8") { type = KvType::int8; }
  for (std::string_view name : runnable_kernels()) {
    CAPTURE(name);
    const KernelTable& table = kernels(name);
    const Cache cache(table, kDim, kDim, type, 70, random);
    const std::vector<float> queries = random_vector(kRows * kRow, -1, 1, random);
    const auto all = attend(table, cache, queries, kGroup, 0, kEnd, kRows, sinks, kStart);
    for (std::size_t row = 0; row < kRows; ++row) {
      const std::int64_t end = kEnd + static_cast<std::int64_t>(row);
      const std::span<const float> query = std::span(queries).subspan(row * kRow, kRow);
      const auto alone = attend(table, cache, query, kGroup, 0, end, 1, sinks, kStart);
      const auto first = all.begin() + static_cast<std::ptrdiff_t>(row * kRow);
      CHECK(same_bits(alone, {first, first + static_cast<std::ptrdiff_t>(kRow)}));
      const auto plain = attend(table, cache, query, kGroup, kStart, end);
      for (std::size_t head = 0; head < kGroup; ++head) {
        double sum = 0;
        for (auto t = static_cast<std::size_t>(kStart); t < static_cast<std::size_t>(end); ++t) {
          double score = 0;
          for (std::size_t i = 0; i < kDim; ++i)
            score += static_cast<double>(query[head * kDim + i]) * cache.keys[t][i];
          sum += std::exp(score);
        }
        const double kept = sum / (sum + std::exp(static_cast<double>(sinks[head])));
        for (std::size_t i = 0; i < kDim; ++i) {
          const double error = alone[head * kDim + i] - kept * static_cast<double>(plain[head * kDim + i]);
          CHECK(std::fabs(error) < (type == KvType::int8 ? 1e-2 : 1e-5));  // int8 scores are not exact
        }
      }
    }
  }
}

TEST_CASE("a query head's attention has the same bits alone and in any group") {
  Random random(4);
  KvType type{};
  SUBCASE("f16") { type = KvType::f16; }
  SUBCASE("int8") { type = KvType::int8; }
  for (std::string_view name : runnable_kernels()) {
    CAPTURE(name);
    const KernelTable& table = kernels(name);
    const Cache cache(table, 40, 24, type, 50, random);
    const std::vector<float> queries = random_vector(7 * 40, -1, 1, random);
    const std::vector<float> all = attend(table, cache, queries, 7, 3, 50);
    for (std::ptrdiff_t head = 0; head < 7; ++head) {
      const std::vector<float> query(queries.begin() + head * 40, queries.begin() + (head + 1) * 40);
      const std::vector<float> expected(all.begin() + head * 24, all.begin() + (head + 1) * 24);
      CHECK(same_bits(attend(table, cache, query, 1, 3, 50), expected));
    }
  }
}

TEST_CASE("a row's attention has the same bits alone and with the rows that follow it") {
  Random random(6);
  KvType type{};
  int group = 1;  // one row a query: rows computed together may lie further apart than a window is long
  SUBCASE("f16") { type = KvType::f16; }
  SUBCASE("int8") { type = KvType::int8; }
  SUBCASE("f32, groups") { group = 3; }
  SUBCASE("int8, groups") {
    type = KvType::int8;
    group = 3;
  }
  constexpr int kRows = 9, kDim = 24;
  const auto row_floats = static_cast<std::size_t>(group * kDim);
  for (std::string_view name : runnable_kernels()) {
    CAPTURE(name);
    const KernelTable& table = kernels(name);
    const Cache cache(table, kDim, kDim, type, 80, random);
    const std::vector<float> queries = random_vector(kRows * row_floats, -1, 1, random);
    struct Window {
      std::int64_t begin, end;
    };
    for (Window window :
         {Window{0, 1}, Window{0, 14}, Window{0, 60}, Window{13, 14}, Window{13, 15}, Window{30, 70}}) {
      CAPTURE(window.end);
      const auto all = attend(table, cache, queries, group, window.begin, window.end, kRows);
      for (int row = 0; row < kRows; ++row) {
        CAPTURE(row);
        const std::size_t at = static_cast<std::size_t>(row) * row_floats;
        const std::int64_t begin = window.begin == 0 ? 0 : window.begin + row;
        const auto alone =
            attend(table, cache, std::span(queries).subspan(at, row_floats), group, begin, window.end + row);
        const auto first = all.begin() + static_cast<std::ptrdiff_t>(at);
        CHECK(same_bits(alone, std::vector<float>(first, first + static_cast<std::ptrdiff_t>(row_floats))));
      }
    }
  }
}

TEST_CASE("store_kv writes one token, the same bytes on every table") {
  Random random(5);
  constexpr int kKey = 19, kValue = 37;
  for (KvType type : {KvType::f32, KvType::f16, KvType::int8}) {
    CAPTURE(static_cast<int>(type));
    const std::vector<float> key =
        random_vector(kKey, -70000, 70000, random);  // past the largest half as well
    const std::vector<float> value = random_vector(kValue, -1e-5f, 1e-5f, random);
    const std::size_t key_bytes = kv_key_bytes(type, kKey), bytes = key_bytes + kv_value_bytes(type, kValue);
    auto store = [&](std::string_view name, int slot) {
      std::vector<std::byte> block(bytes, std::byte{0xa5});
      kernels(name).store_kv(key.data(), value.data(), kKey, kValue, type, slot, block.data(),
                             block.data() + key_bytes);
      return block;
    };
    for (int slot : {0, 9, 15}) {
      const std::vector<std::byte> expected = store("scalar", slot);
      std::size_t written = 0;
      for (std::byte b : expected) written += b != std::byte{0xa5};
      CHECK(written <= bytes / kKvBlockTokens);
      CHECK(written >= bytes / kKvBlockTokens * 3 / 4);
      for (std::string_view name : runnable_kernels()) {
        CAPTURE(name);
        CHECK(store(name, slot) == expected);
      }
    }
  }
}

}  // namespace
}  // namespace edgert
