// Sequence mixing by attention over the KV cache.
#include <algorithm>
#include <cmath>

#include "model/decoder.h"

namespace edgert {
namespace {

void clamp(float* x, std::size_t n, float limit) {
  for (std::size_t i = 0; i < n; ++i) x[i] = std::clamp(x[i], -limit, limit);
}

// Rotates the first 2 * half elements of one head.
void rotate_head(float* x, const float* cosine, const float* sine, std::size_t half, RopeLayout layout) {
  const std::size_t step = layout == RopeLayout::half ? 1 : 2;
  const std::size_t partner = layout == RopeLayout::half ? half : 1;
  for (std::size_t i = 0; i < half; ++i) {
    float& a = x[i * step];
    float& b = x[i * step + partner];
    const float rotated = a * cosine[i] - b * sine[i];
    b = b * cosine[i] + a * sine[i];
    a = rotated;
  }
}

// The first position of the chunk that `position` lies in.
std::int64_t chunk_start(const AttentionRecipe& a, std::int64_t position) {
  return a.chunk ? position / *a.chunk * *a.chunk : 0;
}

// Of the queries at a position; grows with every `floor` positions.
float temperature(const AttentionRecipe& a, std::int64_t position) {
  if (!a.temperature) return 1;
  const float steps =
      std::floor((static_cast<float>(position) + a.temperature->offset) / a.temperature->floor);
  return std::log1p(steps) * a.temperature->scale + 1;
}

}  // namespace

void Decoder::mix(int layer, const AttentionRecipe& a, const AttentionWeights& w, Activations& in,
                  std::span<const BatchRow> rows) {
  const auto width = static_cast<std::size_t>(a.num_heads * a.head_dim);
  const std::size_t kv_width = w.k.rows;
  if (any_integer({w.q.format, w.k.format, w.v.format}) || (w.gate && any_integer({w.gate->format})))
    quantize(machine_, in, hidden());
  std::vector<Product> products{product(w.q, in, s_.q, width, w.q_bias),
                                product(w.k, in, s_.k, kv_width, w.k_bias)};
  if (!a.values_are_keys) products.push_back(product(w.v, in, s_.v, kv_width, w.v_bias));
  if (w.gate) products.push_back(product(*w.gate, in, s_.wide, width, w.gate_bias));
  multiply(machine_, products);
  if (a.values_are_keys) std::copy_n(s_.k, rows.size() * kv_width, s_.v);
  project_qkv(a, w, recipe_.block(layer).norm_eps, rows.size());
  rotate(a, rows);
  give_kv(w, rows);
  attend(layer, a, w.sinks, rows);

  Activations mixed{s_.mixed, width, rows.size(), s_.inputs};
  if (w.gate) {
    machine_.for_rows(rows.size(), [&](std::size_t i, int) {
      machine_.kernels.sigmoid_mul(s_.mixed + i * width, s_.wide + i * width, width);
    });
  }
  observe(layer, Site::attention_o, mixed);
  if (any_integer({w.o.format})) quantize(machine_, mixed, width);
  multiply(machine_, {product(w.o, mixed, s_.projected, hidden(), w.o_bias)});
}

void Decoder::give_kv(const AttentionWeights& w, std::span<const BatchRow> rows) {
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].token < recipe_.vocab_size) continue;
    const std::span space(s_.mixed + i * w.q.rows, w.k.rows);  // as wide at least, and not needed yet
    for (const auto& [target, to] : {std::pair(w.given_keys, s_.k), std::pair(w.given_values, s_.v)})
      mixes_[i]->replace_row(target, rows[i].token, {to + i * w.k.rows, w.k.rows}, space);
  }
}

// What stands between projection and rotation: norms and clipping.
void Decoder::project_qkv(const AttentionRecipe& a, const AttentionWeights& w, float norm_eps,
                          std::size_t rows) {
  if (a.qk_norm == QkNorm::none && !a.clip_qkv && !a.value_norm) return;
  const auto dim = static_cast<std::size_t>(a.head_dim);
  machine_.for_rows(rows, [&](std::size_t i, int) {
    float* q = s_.q + i * w.q.rows;
    float* k = s_.k + i * w.k.rows;
    float* v = s_.v + i * w.k.rows;
    const auto norm = [&](float* x, std::size_t n, const float* weight, std::size_t width) {
      for (std::size_t at = 0; at < n; at += width) {
        machine_.kernels.rms_norm(x + at, weight, width, norm_eps, x + at);
      }
    };
    if (a.qk_norm != QkNorm::none) {
      const bool by_row = a.qk_norm == QkNorm::row;
      norm(q, w.q.rows, w.q_norm, by_row ? w.q.rows : dim);
      norm(k, w.k.rows, w.k_norm, by_row ? w.k.rows : dim);
    }
    if (a.value_norm) norm(v, w.k.rows, nullptr, dim);
    if (a.clip_qkv) {
      clamp(q, w.q.rows, *a.clip_qkv);
      clamp(k, w.k.rows, *a.clip_qkv);
      clamp(v, w.k.rows, *a.clip_qkv);
    }
  });
}

// Each row's cosines and sines into rotation, unless the layer before had the same.
void Decoder::find_angles(const RopeRecipe& rope, std::span<const BatchRow> rows) {
  if (rotated_ == &rope) return;
  rotated_ = &rope;
  const auto& longer = rope.long_context;
  const bool use_long = longer && shape_.context > longer->beyond;
  const std::vector<float>& inv_freq = use_long ? longer->inv_freq : rope.inv_freq;
  const float factor = use_long ? longer->attention_factor : rope.attention_factor;
  const std::size_t half = inv_freq.size();
  machine_.for_rows(rows.size(), [&](std::size_t i, int) {
    float* cosine = s_.rotation + i * 2 * half;
    float* sine = cosine + half;
    for (std::size_t j = 0; j < half; ++j) {
      // The angle is rounded to f32, as every framework does.
      const float angle = static_cast<float>(rows[i].position) * inv_freq[j];
      cosine[j] = std::cos(angle) * factor;
      sine[j] = std::sin(angle) * factor;
    }
  });
}

void Decoder::rotate(const RopeRecipe& rope, std::size_t row, float* x) const {
  const std::size_t half = rope.inv_freq.size();
  const float* cosine = s_.rotation + row * 2 * half;
  rotate_head(x, cosine, cosine + half, half, rope.layout);
}

void Decoder::rotate(const AttentionRecipe& a, std::span<const BatchRow> rows) {
  const auto dim = static_cast<std::size_t>(a.head_dim);
  const auto heads = static_cast<std::size_t>(a.num_heads);
  const auto kv_heads = static_cast<std::size_t>(a.num_kv_heads);
  if (a.rope) find_angles(*a.rope, rows);
  machine_.for_rows(rows.size(), [&](std::size_t i, int) {
    float* q = s_.q + i * heads * dim;
    float* k = s_.k + i * kv_heads * dim;
    if (a.rope) {
      for (std::size_t h = 0; h < heads; ++h) rotate(*a.rope, i, q + h * dim);
      for (std::size_t h = 0; h < kv_heads; ++h) rotate(*a.rope, i, k + h * dim);
    }
    const float scale = a.scale * temperature(a, rows[i].position);
    for (std::size_t j = 0; j < heads * dim; ++j) q[j] *= scale;
  });
}

void Decoder::attend(int layer, const AttentionRecipe& a, const float* sinks,
                     std::span<const BatchRow> rows) {
  const auto dim = static_cast<std::size_t>(a.head_dim);
  const auto kv_heads = static_cast<std::size_t>(a.num_kv_heads);
  const auto group = static_cast<std::size_t>(a.num_heads) / kv_heads;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    std::byte* block = rows[i].sequence->block(rows[i].position);
    for (std::size_t h = 0; h < kv_heads; ++h) {
      const std::size_t at = (i * kv_heads + h) * dim;
      machine_.kernels.store_kv(s_.k + at, s_.v + at, a.head_dim, a.head_dim, kv_.type,
                                static_cast<int>(rows[i].position % kKvBlockTokens),
                                block + kv_.key_offset(layer, static_cast<int>(h)),
                                block + kv_.value_offset(layer, static_cast<int>(h)));
    }
  }
  // Rows that follow one another share the loads of keys and values.
  find_runs(rows, attention_rows(a.num_heads / a.num_kv_heads), attended_, [&](std::size_t i) {
    return chunk_start(a, rows[i].position) == chunk_start(a, rows[i - 1].position);
  });
  machine_.pool.run(static_cast<int>(attended_.size() * kv_heads), 1, [&](int begin, int end, int worker) {
    for (int item = begin; item < end; ++item) {
      // One head after the other: its keys and values stay in a cache while the rows go by.
      const auto [first, count] = attended_[static_cast<std::size_t>(item) % attended_.size()];
      const std::size_t h = static_cast<std::size_t>(item) / attended_.size();
      const std::size_t at = (first * kv_heads + h) * group * dim;
      Attention work;
      work.queries = s_.q + at;
      work.query_stride = kv_heads * group * dim;
      work.rows = count;
      work.group = static_cast<int>(group);
      work.head_dim = a.head_dim;
      work.value_dim = a.head_dim;
      work.kv_type = kv_.type;
      work.blocks = rows[first].sequence->blocks();
      work.key_offset = kv_.key_offset(layer, static_cast<int>(h));
      work.value_offset = kv_.value_offset(layer, static_cast<int>(h));
      work.end = rows[first].position + 1;
      work.window = a.window.value_or(0);
      work.start = chunk_start(a, rows[first].position);
      if (sinks != nullptr) work.sinks = sinks + h * group;
      work.scratch = s_.attention + static_cast<std::size_t>(worker) * s_.attention_floats;
      work.out = s_.mixed + at;
      work.out_stride = work.query_stride;
      machine_.kernels.attention(work);
    }
  });
}

}  // namespace edgert
