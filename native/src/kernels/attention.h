// Attention of one activation row over one KV head, over any vector class (see vector.h).
//
// Two passes: all scores into scratch, softmax, then values block by block in the order of tokens. The keys
// of a block are a float tile whose rows are tokens. Slots outside [begin, end) may hold anything: their
// scores are never read and their values never touched.
#pragma once

#include "kernels/elementwise.h"
#include "kernels/matmul.h"

namespace edgert {

template <class V, class Element>
void attention_over(const Attention& work) {
  constexpr std::int64_t kTokens = kKvBlockTokens;
  const std::int64_t first_block = work.begin / kTokens;
  const std::int64_t end_block = (work.end + kTokens - 1) / kTokens;
  const auto group = static_cast<std::size_t>(work.group);
  const auto head_dim = static_cast<std::size_t>(work.head_dim);
  const auto value_dim = static_cast<std::size_t>(work.value_dim);
  const std::size_t value_stride = (value_dim + 15) / 16 * 16;
  const auto stride = static_cast<std::size_t>(end_block - first_block) * kTokens;  // scores of a head

  for (std::int64_t b = first_block; b < end_block; ++b) {
    const auto* keys = reinterpret_cast<const Element*>(work.blocks[b] + work.key_offset);
    for_each_block<V::kRegisters / 8>(group, [&]<int M>(Count<M>, std::size_t head) {
      const float* queries[M];
      for (std::size_t r = 0; r < M; ++r) queries[r] = work.queries + (head + r) * head_dim;
      TileResult<V, M> scores;
      float_tile<V, Element, M>(keys, head_dim, queries, scores);
      for (std::size_t r = 0; r < M; ++r) {
        float* out = work.scratch + (head + r) * stride + (b - first_block) * kTokens;
        __builtin_memcpy(out, scores[r], kTokens * sizeof(float));
      }
    });
  }
  const auto skipped = static_cast<std::size_t>(work.begin - first_block * kTokens);
  for (std::size_t head = 0; head < group; ++head) {
    softmax<V>(work.scratch + head * stride + skipped, static_cast<std::size_t>(work.end - work.begin));
  }

  for (std::size_t i = 0; i < group * value_dim; ++i) work.out[i] = 0.0f;
  for (std::int64_t b = first_block; b < end_block; ++b) {
    const auto* values = reinterpret_cast<const Element*>(work.blocks[b] + work.value_offset);
    const std::int64_t base = b * kTokens;
    const auto begin = static_cast<std::size_t>(work.begin > base ? work.begin - base : 0);
    const auto end = static_cast<std::size_t>(work.end - base < kTokens ? work.end - base : kTokens);
    const float* block_weights = work.scratch + (b - first_block) * kTokens;
    for_each_block<V::kRegisters / 8>(group, [&]<int M>(Count<M>, std::size_t head) {
      for (std::size_t i = 0; i < value_dim; i += V::kWidth) {
        const auto lanes = static_cast<std::ptrdiff_t>(value_dim - i);
        float* out = work.out + head * value_dim + i;
        typename V::Float sums[M];
        for (std::size_t r = 0; r < M; ++r) sums[r] = V::load_partial(out + r * value_dim, lanes, 0.0f);
        for (std::size_t t = begin; t < end; ++t) {
          const auto v = V::load(values + t * value_stride + i);
          for (std::size_t r = 0; r < M; ++r) {
            sums[r] = V::madd(v, V::splat(block_weights[(head + r) * stride + t]), sums[r]);
          }
        }
        for (std::size_t r = 0; r < M; ++r) V::store_partial(out + r * value_dim, sums[r], lanes);
      }
    });
  }
}

template <class V>
void attention(const Attention& work) {
  work.kv_type == KvType::f32 ? attention_over<V, float>(work) : attention_over<V, Half>(work);
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
