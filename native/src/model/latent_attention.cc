// Latent attention in its absorbed form: queries go into the latent space of keys and values, where all heads
// attend to the same rows, and what they gather comes out through each head's own values.
#include <algorithm>

#include "model/decoder.h"
#include "quant/pack.h"

namespace edgert {

void Decoder::mix(int layer, const LatentAttentionRecipe& a, const LatentAttentionWeights& w, Activations& in,
                  std::span<const BatchRow> rows) {
  const auto rank = static_cast<std::size_t>(a.kv_rank);
  const auto key_dim = static_cast<std::size_t>(a.key_dim());
  const std::size_t q_rank = w.q_a ? w.q_a->rows : 0;
  const Matrix& from_hidden = w.q_a ? *w.q_a : w.q;
  if (any_integer({from_hidden.format, w.kv_a.format})) quantize(machine_, in, hidden());
  multiply(machine_, {product(from_hidden, in, q_rank != 0 ? s_.mixed : s_.q, from_hidden.rows, w.q_a_bias),
                      product(w.kv_a, in, s_.k, key_dim, w.kv_a_bias)});
  find_angles(a.rope, rows);
  machine_.for_rows(rows.size(), [&](std::size_t i, int) {
    float* latent = s_.k + i * key_dim;
    machine_.kernels.rms_norm(latent, w.kv_a_norm, rank, a.norm_eps, latent);
    rotate(a.rope, i, latent + rank);
    float* q = s_.mixed + i * q_rank;
    if (q_rank != 0) machine_.kernels.rms_norm(q, w.q_a_norm, q_rank, a.norm_eps, q);
  });
  if (q_rank != 0) {
    Activations low{s_.mixed, q_rank, rows.size(), s_.inputs};
    observe(layer, Site::attention_q_b, low);
    if (any_integer({w.q.format})) quantize(machine_, low, q_rank);
    multiply(machine_, {product(w.q, low, s_.q, w.q.rows)});
  }
  absorb_queries(layer, a, w, rows.size());
  attend_latent(layer, a, rows);

  const auto heads = static_cast<std::size_t>(a.num_heads);
  const std::size_t width = heads * static_cast<std::size_t>(a.value_head_dim);
  Activations gathered{s_.mixed, rank, rows.size() * heads, s_.inputs};
  observe(layer, Site::attention_v_b, gathered);
  if (any_integer({w.v_b.format})) quantize(machine_, gathered, rank);
  multiply(machine_, products_by_head(w.v_b, heads, gathered, s_.q, width));
  Activations mixed{s_.q, width, rows.size(), s_.inputs};
  observe(layer, Site::attention_o, mixed);
  if (any_integer({w.o.format})) quantize(machine_, mixed, width);
  multiply(machine_, {product(w.o, mixed, s_.projected, hidden(), w.o_bias)});
}

// The products of each head's slab of `matrix` with that head's rows of `in` [rows][heads].
std::vector<Product> Decoder::products_by_head(const Matrix& matrix, std::size_t heads, const Activations& in,
                                               float* y, std::size_t y_stride) {
  const std::size_t rows = in.rows / heads, slab = matrix.rows / heads;
  const std::size_t slab_bytes = packed_bytes(format(matrix.format), slab, matrix.cols);
  std::vector<Product> products;
  for (std::size_t h = 0; h < heads; ++h) {
    const Matrix of_head{
        .format = matrix.format, .rows = slab, .cols = matrix.cols, .data = matrix.data + h * slab_bytes};
    std::int32_t* gather = s_.head_rows + h * rows;
    for (std::size_t i = 0; i < rows; ++i) gather[i] = static_cast<std::int32_t>(i * heads + h);
    Product& p = products.emplace_back(product(of_head, in, y + h * (y_stride / heads), y_stride));
    p.gather = gather;
    p.m = rows;
  }
  return products;
}

// From the projected queries [heads][nope | rope] to those over latent rows, [heads][rank | rope], scaled.
void Decoder::absorb_queries(int layer, const LatentAttentionRecipe& a, const LatentAttentionWeights& w,
                             std::size_t rows) {
  const auto heads = static_cast<std::size_t>(a.num_heads);
  const auto nope = static_cast<std::size_t>(a.nope_head_dim);
  const auto rope = static_cast<std::size_t>(a.rope_head_dim);
  const auto rank = static_cast<std::size_t>(a.kv_rank);
  Activations queries{s_.q, nope + rope, rows * heads, s_.inputs};
  observe(layer, Site::attention_k_b, queries);
  if (any_integer({w.k_b.format})) quantize(machine_, queries, nope);
  multiply(machine_, products_by_head(w.k_b, heads, queries, s_.wide, heads * (rank + rope)));
  machine_.for_rows(rows, [&](std::size_t i, int) {
    for (std::size_t h = i * heads; h < (i + 1) * heads; ++h) {
      float* query = s_.wide + h * (rank + rope);
      std::copy_n(s_.q + h * (nope + rope) + nope, rope, query + rank);
      rotate(a.rope, i, query + rank);
      for (std::size_t j = 0; j < rank + rope; ++j) query[j] *= a.scale;
    }
  });
}

void Decoder::attend_latent(int layer, const LatentAttentionRecipe& a, std::span<const BatchRow> rows) {
  const auto heads = static_cast<std::size_t>(a.num_heads);
  const auto rank = static_cast<std::size_t>(a.kv_rank);
  const auto key_dim = static_cast<std::size_t>(a.key_dim());
  const std::size_t key_offset = kv_.key_offset(layer, 0), value_offset = kv_.value_offset(layer, 0);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const float* latent = s_.k + i * key_dim;
    std::byte* block = rows[i].sequence->block(rows[i].position);
    machine_.kernels.store_kv(latent, latent, a.key_dim(), a.kv_rank, kv_.type,
                              static_cast<int>(rows[i].position % kKvBlockTokens), block + key_offset,
                              block + value_offset);
  }
  // Heads share all keys and values: as few threads as there are go through those of a row.
  const auto group = static_cast<std::size_t>(latent_group(a.num_heads, machine_.pool.threads()));
  const std::size_t groups = (heads + group - 1) / group;
  machine_.pool.run(static_cast<int>(rows.size() * groups), 1, [&](int begin, int end, int worker) {
    for (int item = begin; item < end; ++item) {
      const std::size_t row = static_cast<std::size_t>(item) / groups;
      const std::size_t first = static_cast<std::size_t>(item) % groups * group;
      Attention work;
      work.queries = s_.wide + (row * heads + first) * key_dim;
      work.query_stride = heads * key_dim;
      work.group = static_cast<int>(std::min(group, heads - first));
      work.head_dim = a.key_dim();
      work.value_dim = a.kv_rank;
      work.kv_type = kv_.type;
      work.blocks = rows[row].sequence->blocks();
      work.key_offset = key_offset;
      work.value_offset = value_offset;
      work.end = rows[row].position + 1;
      work.scratch = s_.attention + static_cast<std::size_t>(worker) * s_.attention_floats;
      work.out = s_.mixed + (row * heads + first) * rank;
      work.out_stride = heads * rank;
      machine_.kernels.attention(work);
    }
  });
}

}  // namespace edgert
