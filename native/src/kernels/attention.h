// Attention of some rows over one KV head, over any vector class (see vector.h).
//
// Two passes: all scores into scratch, softmax, then values block by block in the order of tokens. The keys
// of a block are a float tile whose rows are tokens. Slots that a row does not attend to may hold anything:
// their scores are never read and their values never touched. Rows and heads that are computed together share
// loads of keys and values, not sums: a query's result does not depend on its company.
#pragma once

#include "kernels/elementwise.h"
#include "kernels/matmul.h"

namespace edgert {

template <class V, class Element>
class AttentionOver {
 public:
  explicit AttentionOver(const Attention& work)
      : work_(work),
        group_(static_cast<std::size_t>(work.group)),
        queries_(static_cast<std::size_t>(work.rows) * group_),
        head_dim_(static_cast<std::size_t>(work.head_dim)),
        value_dim_(static_cast<std::size_t>(work.value_dim)),
        value_stride_((value_dim_ + 15) / 16 * 16),
        first_(work.first_block() * kKvBlockTokens),
        stride_(static_cast<std::size_t>(work.end_block() * kKvBlockTokens - first_)) {}

  void run() const {
    for (std::int64_t b = work_.first_block(); b < work_.end_block(); ++b) {
      for_each_block<kTogether>(queries_, [&]<int M>(Count<M>, std::size_t q) { score<M>(b, q); });
    }
    for (std::size_t q = 0; q < queries_; ++q) {
      const auto count = static_cast<std::size_t>(end(q) - begin(q));
      softmax<V>(scores(q, begin(q)), count);
      for (std::size_t i = 0; i < value_dim_; ++i) out(q)[i] = 0.0f;
    }
    for (std::int64_t b = work_.first_block(); b < work_.end_block(); ++b) {
      for_each_block<kTogether>(queries_, [&]<int M>(Count<M>, std::size_t q) { sum_values<M>(b, q); });
    }
  }

 private:
  static constexpr int kTogether = V::kRegisters / 8;

  int row(std::size_t query) const { return static_cast<int>(query / group_); }
  std::int64_t begin(std::size_t query) const { return work_.begin(row(query)); }
  std::int64_t end(std::size_t query) const { return work_.end + row(query); }
  float* scores(std::size_t query, std::int64_t position) const {
    return work_.scratch + query * stride_ + (position - first_);
  }
  float* out(std::size_t query) const {
    return work_.out + query / group_ * work_.out_stride + query % group_ * value_dim_;
  }

  template <int M>
  void score(std::int64_t block, std::size_t q) const {
    const auto* keys = reinterpret_cast<const Element*>(work_.blocks[block] + work_.key_offset);
    const float* x[M];
    for (std::size_t r = 0; r < M; ++r) {
      x[r] = work_.queries + (q + r) / group_ * work_.query_stride + (q + r) % group_ * head_dim_;
    }
    TileResult<V, M> result;
    float_tile<V, Element, M>(keys, head_dim_, x, result);
    for (std::size_t r = 0; r < M; ++r) {
      __builtin_memcpy(scores(q + r, block * kKvBlockTokens), result[r], kKvBlockTokens * sizeof(float));
    }
  }

  // Every query sums in the order of tokens: those that it alone attends to, those that all M do, its own
  // again.
  template <int M>
  void sum_values(std::int64_t block, std::size_t q) const {
    const std::int64_t common_end = end(q);
    const std::int64_t common = begin(q + M - 1) < common_end ? begin(q + M - 1) : common_end;
    for (std::size_t r = 0; r < M; ++r) add_values<1>(block, q + r, begin(q + r), common);
    add_values<M>(block, q, common, common_end);
    for (std::size_t r = 0; r < M; ++r) add_values<1>(block, q + r, common_end, end(q + r));
  }

  // out += weights * values over the positions of [from, to) that lie in the block.
  template <int M>
  void add_values(std::int64_t block, std::size_t q, std::int64_t from, std::int64_t to) const {
    const std::int64_t base = block * kKvBlockTokens;
    from = from > base ? from : base;
    to = to < base + kKvBlockTokens ? to : base + kKvBlockTokens;
    if (from >= to) return;
    const auto* values = reinterpret_cast<const Element*>(work_.blocks[block] + work_.value_offset) +
                         static_cast<std::size_t>(from - base) * value_stride_;
    const auto tokens = static_cast<std::size_t>(to - from);
    for (std::size_t i = 0; i < value_dim_; i += V::kWidth) {
      const auto lanes = static_cast<std::ptrdiff_t>(value_dim_ - i);
      typename V::Float sums[M];
      const float* weights[M];
#pragma GCC unroll 8
      for (std::size_t r = 0; r < M; ++r) {
        sums[r] = V::load_partial(out(q + r) + i, lanes, 0.0f);
        weights[r] = scores(q + r, from);
      }
      for (std::size_t t = 0; t < tokens; ++t) {
        const auto v = V::load(values + t * value_stride_ + i);
#pragma GCC unroll 8
        for (std::size_t r = 0; r < M; ++r) sums[r] = V::madd(v, V::splat(weights[r][t]), sums[r]);
      }
#pragma GCC unroll 8
      for (std::size_t r = 0; r < M; ++r) V::store_partial(out(q + r) + i, sums[r], lanes);
    }
  }

  const Attention& work_;
  const std::size_t group_, queries_, head_dim_, value_dim_, value_stride_;
  const std::int64_t first_;  // position of the first block
  const std::size_t stride_;  // scores of a query
};

template <class V>
void attention(const Attention& work) {
  work.kv_type == KvType::f32 ? AttentionOver<V, float>(work).run() : AttentionOver<V, Half>(work).run();
}

// Element i of `from` to element i * stride of `to`.
template <class V>
void store_strided(const float* from, int n, KvType type, std::byte* to, int stride) {
  constexpr int W = V::kWidth;
  for (int i = 0; i < n; i += W) {
    const int lanes = n - i < W ? n - i : W;
    const auto v = V::load_partial(from + i, lanes, 0.0f);
    Half halves[W];
    if (type == KvType::f16) V::store_half(halves, v);
    for (int j = 0; j < lanes; ++j) {
      const auto at = static_cast<std::size_t>((i + j) * stride);
      if (type == KvType::f16) {
        __builtin_memcpy(to + at * sizeof(Half), halves + j, sizeof(Half));
      } else {
        __builtin_memcpy(to + at * sizeof(float), from + i + j, sizeof(float));
      }
    }
  }
}

template <class V>
void store_kv(const float* key, const float* value, int head_dim, int value_dim, KvType type, int slot,
              std::byte* keys, std::byte* values) {
  const std::size_t element = type == KvType::f16 ? sizeof(Half) : sizeof(float);
  const auto value_stride = static_cast<std::size_t>((value_dim + 15) / 16 * 16);
  const auto row = static_cast<std::size_t>(slot);
  store_strided<V>(key, head_dim, type, keys + row * element, kKvBlockTokens);
  store_strided<V>(value, value_dim, type, values + row * value_stride * element, 1);
}

}  // namespace edgert
