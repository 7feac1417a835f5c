// Sequence mixing by a gated delta net: a short convolution over queries, keys and values, then a state of
// fixed size a head that each token decays, corrects and reads.
#include <algorithm>
#include <cmath>

#include "model/decoder.h"

namespace edgert {
namespace {

constexpr float kNormEps = 1e-6F;  // of queries and keys

// x *= factor / |x|
void normalize(float* x, std::size_t n, float factor) {
  float squares = 0;
  for (std::size_t i = 0; i < n; ++i) squares += x[i] * x[i];
  const float scale = factor / std::sqrt(squares + kNormEps);
  for (std::size_t i = 0; i < n; ++i) x[i] *= scale;
}

float softplus(float x) { return x > 20 ? x : std::log1p(std::exp(x)); }

}  // namespace

void Decoder::mix(int layer, const GatedDeltaRecipe& d, const GatedDeltaWeights& w, Activations& in,
                  std::span<const BatchRow> rows) {
  const auto channels = static_cast<std::size_t>(d.channels());
  const auto values = static_cast<std::size_t>(d.values());
  const auto heads = static_cast<std::size_t>(d.num_value_heads);
  const auto key_dim = static_cast<std::size_t>(d.key_head_dim);
  const auto value_dim = static_cast<std::size_t>(d.value_head_dim);
  const StateLayout::Layer& state = state_.layers[static_cast<std::size_t>(layer)];
  const auto keys = static_cast<std::size_t>(d.keys());
  if (any_integer({w.q.format, w.k.format, w.v.format, w.z.format})) quantize(machine_, in, hidden());
  multiply(machine_, {product(w.q, in, s_.q, channels), product(w.k, in, s_.q + keys, channels),
                      product(w.v, in, s_.q + 2 * keys, channels), product(w.z, in, s_.v, values),
                      product(w.a, in, s_.gates, 2 * heads), product(w.b, in, s_.gates + heads, 2 * heads)});
  Convolution work;
  work.x = s_.q;
  work.x_stride = channels;
  work.width = d.conv_kernel;
  work.channels = channels;
  work.weights = reinterpret_cast<const float*>(w.conv.data);
  work.silu = true;
  work.y = s_.mixed;
  work.y_stride = channels;
  convolve(work, state.history, rows);
  machine_.for_rows(rows.size(), [&](std::size_t i, int) {
    float* query = s_.mixed + i * channels;
    for (int h = 0; h < d.num_key_heads; ++h, query += key_dim)
      normalize(query, key_dim, 1 / std::sqrt(static_cast<float>(key_dim)));
    for (int h = 0; h < d.num_key_heads; ++h, query += key_dim) normalize(query, key_dim, 1);
    float* decay = s_.gates + i * 2 * heads;
    float* beta = decay + heads;
    for (std::size_t h = 0; h < heads; ++h) {
      decay[h] = std::exp(w.decay[h] * softplus(decay[h] + w.dt_bias[h]));
      beta[h] = 1 / (1 + std::exp(-beta[h]));
    }
  });
  delta_rule(d, state.recurrence, rows);

  Activations mixed{s_.v, values, rows.size(), s_.inputs};
  mixed.quantized.padded = round_up(values, kMaxGroup);
  const bool integer = any_integer({w.o.format});
  machine_.for_rows(rows.size(), [&](std::size_t i, int) {
    for (std::size_t at = i * values; at < (i + 1) * values; at += value_dim)
      machine_.kernels.rms_norm(s_.k + at, w.norm, value_dim, d.norm_eps, s_.k + at);
    machine_.kernels.silu_mul(s_.v + i * values, s_.k + i * values, values);
    if (integer) quantize_row(machine_, mixed, values, i);
  });
  observe(layer, Site::delta_o, mixed);
  multiply(machine_, {product(w.o, mixed, s_.projected, hidden())});
}

// Of the convolved rows, into s_.k; each sequence's states are at `offset` of what it keeps.
void Decoder::delta_rule(const GatedDeltaRecipe& d, std::size_t offset, std::span<const BatchRow> rows) {
  const auto channels = static_cast<std::size_t>(d.channels());
  const auto keys = static_cast<std::size_t>(d.keys());
  const auto heads = static_cast<std::size_t>(d.num_value_heads);
  const auto value_dim = static_cast<std::size_t>(d.value_head_dim);
  const std::size_t state_floats = delta_state_floats(d.key_head_dim, d.value_head_dim);
  machine_.pool.run(static_cast<int>(runs_.size() * heads), 1, [&](int begin, int end, int) {
    for (int item = begin; item < end; ++item) {
      const auto [first, count] = runs_[static_cast<std::size_t>(item) / heads];
      const std::size_t h = static_cast<std::size_t>(item) % heads;
      const SequenceState& state = rows[first].sequence->state();
      const float* before = state.before(rows[first].position);
      const std::size_t at = offset + h * state_floats;
      const int key_at = d.key_head(static_cast<int>(h)) * d.key_head_dim;
      DeltaRule work;
      work.queries = s_.mixed + first * channels + static_cast<std::size_t>(key_at);
      work.keys = work.queries + keys;
      work.values = s_.mixed + first * channels + 2 * keys + h * value_dim;
      work.row_stride = channels;
      work.decay = s_.gates + first * 2 * heads + h;
      work.beta = work.decay + heads;
      work.gate_stride = 2 * heads;
      work.rows = count;
      work.key_dim = d.key_head_dim;
      work.value_dim = d.value_head_dim;
      work.state = before == nullptr ? nullptr : before + at;
      work.next_state = state.after() + at;
      work.out = s_.k + first * heads * value_dim + h * value_dim;
      work.out_stride = heads * value_dim;
      machine_.kernels.delta_rule(work);
    }
  });
}

}  // namespace edgert
