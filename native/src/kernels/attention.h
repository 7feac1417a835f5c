// Attention of some rows over one KV head, over any vector class (see vector.h).
//
// Two passes: all scores into scratch, softmax, then values block by block in the order of tokens. The keys
// of a block are a float tile whose rows are tokens. Slots that a row does not attend to may hold anything:
// their scores are never read and their values never touched. Rows and heads that are computed together share
// loads of keys and values, not sums: a query's result does not depend on its company.
#pragma once

#include <type_traits>

#include "kernels/elementwise.h"
#include "kernels/matmul.h"

namespace edgert {

struct Int8 {};  // KvType::int8

// How int8 keys and values of one KV head lie in a block.
struct Int8Kv {
  static constexpr std::size_t kGroup = kActivationGroup;
  static std::size_t padded(std::size_t dim) { return (dim + kGroup - 1) / kGroup * kGroup; }
  static IntegerTile keys(const std::byte* at, std::size_t head_dim) {
    const std::size_t codes = padded(head_dim) * kTileRows;
    const std::size_t bytes = codes + padded(head_dim) / kGroup * kTileRows * sizeof(Half);
    IntegerTile tile;
    tile.codes = at;
    tile.scales = at + codes;
    tile.code_bytes = codes;
    tile.padded = padded(head_dim);
    tile.bytes = tile.next = bytes;
    return tile;
  }
  static std::size_t value_scales(std::size_t value_dim) {  // where they begin
    return (value_dim + 15) / 16 * 16 * kKvBlockTokens;
  }
};

// Queries as integer products want them.
template <class V>
class QuantizedQueries {
 public:
  QuantizedQueries(float* space, std::size_t queries, std::size_t dim)
      : dim_(dim),
        groups_(Int8Kv::padded(dim) / Int8Kv::kGroup),
        scales_(space),
        sums_(reinterpret_cast<GroupSum*>(space + queries * groups_)),
        codes_(reinterpret_cast<std::int8_t*>(space + 3 * queries * groups_)) {}
  void set(std::size_t query, const float* x) {
    const std::size_t at = query * groups_;
    quantize<V>(x, dim_, groups_ * Int8Kv::kGroup, codes_ + at * Int8Kv::kGroup, scales_ + at, sums_ + at);
  }
  QuantizedRow row(std::size_t query) const {
    const std::size_t at = query * groups_;
    return {codes_ + at * Int8Kv::kGroup, scales_ + at, sums_ + at};
  }

 private:
  std::size_t dim_, groups_;
  float* scales_;
  GroupSum* sums_;
  std::int8_t* codes_;
};

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
        stride_(static_cast<std::size_t>(work.end_block() * kKvBlockTokens - first_)),
        quantized_(work.scratch + queries_ * stride_, queries_, head_dim_) {}

  void run() {
    if constexpr (kInt8) {
      for (std::size_t q = 0; q < queries_; ++q) quantized_.set(q, query(q));
    }
    const std::int64_t first = work_.first_block(), past = work_.end_block();
    for (std::int64_t b = first; b < past; ++b) {
      ahead_ = b + 1 < past ? keys_of(b + 1) : values_of(first);
      for_each_block<kTogether>(queries_, [&]<int M>(Count<M>, std::size_t q) { score<M>(b, q); });
    }
    for (std::size_t q = 0; q < queries_; ++q) {
      const auto count = static_cast<std::size_t>(end(q) - begin(q));
      softmax_with<V>(scores(q, begin(q)), count,
                      work_.sinks == nullptr ? nullptr : work_.sinks + q % group_);
      for (std::size_t i = 0; i < value_dim_; ++i) out(q)[i] = 0.0f;
    }
    for (std::int64_t b = first; b < past; ++b) {
      ahead_ = b + 1 < past ? values_of(b + 1) : nullptr;
      for_each_block<kTogether>(queries_, [&]<int M>(Count<M>, std::size_t q) { sum_values<M>(b, q); });
    }
  }

 private:
  static constexpr int kTogether = V::kRegisters / 8;
  static constexpr bool kInt8 = std::is_same_v<Element, Int8>;

  const std::byte* keys_of(std::int64_t block) const { return work_.blocks[block] + work_.key_offset; }
  const std::byte* values_of(std::int64_t block) const { return work_.blocks[block] + work_.value_offset; }
  int row(std::size_t query) const { return static_cast<int>(query / group_); }
  std::int64_t begin(std::size_t query) const { return work_.begin(row(query)); }
  std::int64_t end(std::size_t query) const { return work_.end + row(query); }
  float* scores(std::size_t query, std::int64_t position) const {
    return work_.scratch + query * stride_ + (position - first_);
  }
  const float* query(std::size_t query) const {
    return work_.queries + query / group_ * work_.query_stride + query % group_ * head_dim_;
  }
  float* out(std::size_t query) const {
    return work_.out + query / group_ * work_.out_stride + query % group_ * value_dim_;
  }

  template <int M>
  void score(std::int64_t block, std::size_t q) const {
    const std::byte* const ahead = q == 0 ? ahead_ : nullptr;
    TileResult<V, M> result[1];
    if constexpr (kInt8) {
      if (ahead != nullptr) prefetch(ahead, kv_key_bytes(work_.kv_type, work_.head_dim));
      QuantizedRow x[M];
      for (std::size_t r = 0; r < M; ++r) x[r] = quantized_.row(q + r);
      integer_tiles<V, kind_of(format(FormatId::int8)), M, 1>({Int8Kv::keys(keys_of(block), head_dim_)},
                                                              false, x, result);
    } else {
      const float* x[M];
      for (std::size_t r = 0; r < M; ++r) x[r] = query(q + r);
      float_tile<V, Element, M>(reinterpret_cast<const Element*>(keys_of(block)), head_dim_, x, result[0],
                                ahead);
    }
    for (std::size_t r = 0; r < M; ++r) {
      __builtin_memcpy(scores(q + r, block * kKvBlockTokens), result[0][r], kKvBlockTokens * sizeof(float));
    }
  }

  // Every query sums in the order of tokens: those that it alone attends to, those that all M do, its own
  // again. A window shorter than M may begin past what the first query sees: nothing is common then.
  template <int M>
  void sum_values(std::int64_t block, std::size_t q) const {
    const std::int64_t common_end = end(q);
    const std::int64_t common = begin(q + M - 1) < common_end ? begin(q + M - 1) : common_end;
    for (std::size_t r = 0; r < M; ++r) add_values<1>(block, q + r, begin(q + r), common);
    add_values<M>(block, q, common, common_end);
    for (std::size_t r = 0; r < M; ++r) {
      const std::int64_t own = begin(q + r) > common_end ? begin(q + r) : common_end;
      add_values<1>(block, q + r, own, end(q + r));
    }
  }

  // out += weights * values over the positions of [from, to) that lie in the block.
  template <int M>
  void add_values(std::int64_t block, std::size_t q, std::int64_t from, std::int64_t to) const {
    const std::int64_t base = block * kKvBlockTokens;
    from = from > base ? from : base;
    to = to < base + kKvBlockTokens ? to : base + kKvBlockTokens;
    if (from >= to) return;
    const Values values{values_of(block), static_cast<std::size_t>(from - base),
                        static_cast<std::size_t>(to - base), from};
    const std::size_t strips = value_dim_ / V::kWidth;
    constexpr int kStrips = V::kRegisters / 2 / M < 8 ? V::kRegisters / 2 / M : 8;
    for_each_block<kStrips>(strips, [&]<int S>(Count<S>, std::size_t strip) {
      add_strips<M, S>(values, q, strip * V::kWidth, V::kWidth);
    });
    const std::size_t rest = strips * V::kWidth;
    if (rest < value_dim_) {
      add_strips<M, 1>(values, q, rest, static_cast<std::ptrdiff_t>(value_dim_ - rest));
    }
  }

  struct Values {
    const std::byte* data;
    std::size_t begin, end;  // tokens of the block
    std::int64_t position;   // of the first
  };
  // Over S strips from element i on, each of so many lanes: tokens are read in order, every strip sums by
  // itself.
  template <int M, int S>
  void add_strips(const Values& values, std::size_t q, std::size_t i, std::ptrdiff_t lanes) const {
    typename V::Float sums[M][S];
    const float* weights[M];
#pragma GCC unroll 8
    for (std::size_t r = 0; r < M; ++r) {
      weights[r] = scores(q + r, values.position);
#pragma GCC unroll 8
      for (std::size_t s = 0; s < S; ++s) {
        sums[r][s] = V::load_partial(out(q + r) + i + s * V::kWidth, lanes, 0.0f);
      }
    }
    const std::byte* const ahead = q == 0 && i == 0 ? ahead_ : nullptr;
    for (std::size_t t = values.begin; t < values.end; ++t) {
      if (ahead != nullptr) prefetch(ahead + t * token_bytes_, token_bytes_);
      typename V::Float weight[M];
#pragma GCC unroll 8
      for (std::size_t r = 0; r < M; ++r) weight[r] = V::splat(weights[r][t - values.begin]);
#pragma GCC unroll 8
      for (std::size_t s = 0; s < S; ++s) {
        const auto v = value(values.data, t, i + s * V::kWidth);
#pragma GCC unroll 8
        for (std::size_t r = 0; r < M; ++r) sums[r][s] = V::madd(v, weight[r], sums[r][s]);
      }
    }
#pragma GCC unroll 8
    for (std::size_t r = 0; r < M; ++r) {
#pragma GCC unroll 8
      for (std::size_t s = 0; s < S; ++s) {
        V::store_partial(out(q + r) + i + s * V::kWidth, sums[r][s], lanes);
      }
    }
  }

  // Of one token, from element i on.
  typename V::Float value(const std::byte* values, std::size_t token, std::size_t i) const {
    const std::size_t at = token * value_stride_ + i;
    if constexpr (kInt8) {
      const std::size_t groups = (value_dim_ + Int8Kv::kGroup - 1) / Int8Kv::kGroup;
      const std::byte* scales = values + Int8Kv::value_scales(value_dim_);
      const auto scale =
          V::template load_raw<float>(scales + (token * groups + i / Int8Kv::kGroup) * sizeof(float));
      return V::to_float(V::load_u8(values + at) - 128) * scale;
    } else {
      return V::load(reinterpret_cast<const Element*>(values) + at);
    }
  }

  const Attention& work_;
  const std::size_t group_, queries_, head_dim_, value_dim_, value_stride_;
  const std::size_t token_bytes_ = kv_value_bytes(work_.kv_type, work_.value_dim) / kKvBlockTokens;
  const std::int64_t first_;  // position of the first block
  const std::size_t stride_;  // scores of a query
  QuantizedQueries<V> quantized_;
  // The block of keys or values that comes next: blocks lie far apart. Null: none.
  const std::byte* ahead_ = nullptr;
};

template <class V>
void attention(const Attention& work) {
  switch (work.kv_type) {
    case KvType::f32:
      return AttentionOver<V, float>(work).run();
    case KvType::f16:
      return AttentionOver<V, Half>(work).run();
    case KvType::int8:
      return AttentionOver<V, Int8>(work).run();
  }
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

// One token's values in groups of codes: body(first element, codes, scale).
template <class V, class Body>
void for_each_code_group(const float* x, int n, Body&& body) {
  constexpr int kGroup = kActivationGroup;
  for (int i = 0; i < n; i += kGroup) {
    std::int8_t codes[kGroup];
    float scale;
    GroupSum sum;
    const int count = n - i < kGroup ? n - i : kGroup;
    quantize<V>(x + i, static_cast<std::size_t>(count), kGroup, codes, &scale, &sum);
    for (std::int8_t& code : codes) code = static_cast<std::int8_t>(code ^ 0x80);
    body(static_cast<std::size_t>(i), codes, scale);
  }
}

template <class V>
void store_int8(const float* key, const float* value, int head_dim, int value_dim, std::size_t row,
                std::byte* keys, std::byte* values) {
  const IntegerTile tile = Int8Kv::keys(keys, static_cast<std::size_t>(head_dim));
  for_each_code_group<V>(key, head_dim, [&](std::size_t i, const std::int8_t* codes, float scale) {
    for (std::size_t j = 0; j < Int8Kv::kGroup; j += 4) {
      __builtin_memcpy(keys + (i + j) * kTileRows + 4 * row, codes + j, 4);
    }
    Half halves[V::kWidth];
    V::store_half(halves, V::splat(scale));
    const std::size_t at = tile.padded * kTileRows + (i / Int8Kv::kGroup * kTileRows + row) * sizeof(Half);
    __builtin_memcpy(keys + at, halves, sizeof(Half));
  });
  const auto dim = static_cast<std::size_t>(value_dim);
  const std::size_t stride = (dim + 15) / 16 * 16, groups = (dim + Int8Kv::kGroup - 1) / Int8Kv::kGroup;
  for_each_code_group<V>(value, value_dim, [&](std::size_t i, const std::int8_t* codes, float scale) {
    const std::size_t count = stride - i < Int8Kv::kGroup ? stride - i : Int8Kv::kGroup;
    __builtin_memcpy(values + row * stride + i, codes, count);
    const std::size_t at = (row * groups + i / Int8Kv::kGroup) * sizeof(float);
    __builtin_memcpy(values + Int8Kv::value_scales(dim) + at, &scale, sizeof scale);
  });
}

template <class V>
void store_kv(const float* key, const float* value, int head_dim, int value_dim, KvType type, int slot,
              std::byte* keys, std::byte* values) {
  const std::size_t element = type == KvType::f16 ? sizeof(Half) : sizeof(float);
  const auto value_stride = static_cast<std::size_t>((value_dim + 15) / 16 * 16);
  const auto row = static_cast<std::size_t>(slot);
  if (type == KvType::int8) return store_int8<V>(key, value, head_dim, value_dim, row, keys, values);
  store_strided<V>(key, head_dim, type, keys + row * element, kKvBlockTokens);
  store_strided<V>(value, value_dim, type, values + row * value_stride * element, 1);
}

}  // namespace edgert
