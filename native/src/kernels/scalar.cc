// The reference: plain loops over the documented layouts. Integer products of every other table equal these
// bit for bit.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "kernels/tables.h"
#include "quant/pack.h"

namespace edgert {
namespace {

float load_element(FormatId id, const std::byte* data, std::size_t index) {
  if (id == FormatId::f32) {
    float value;
    std::memcpy(&value, data + index * sizeof value, sizeof value);
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, data + index * sizeof bits, sizeof bits);
  return id == FormatId::bf16 ? bfloat_to_float(bits) : half_to_float(bits);
}

float float_dot(FormatId id, const std::byte* tile, std::size_t lane, const float* x, std::size_t cols) {
  float sums[4] = {};
  for (std::size_t k = 0; k < cols; ++k) sums[k % 4] += load_element(id, tile, k * kTileRows + lane) * x[k];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The code of one column, gathered from the bit planes.
int code_at(const std::byte* planes, int bits, std::size_t padded, std::size_t lane, std::size_t column) {
  unsigned code = 0;
  int shift = 0;
  for (int width : {8, 4, 2, 1}) {
    if (!(bits & width)) continue;
    const std::size_t columns = static_cast<std::size_t>(32 / width);  // of a 64-byte vector
    const std::size_t within = column % columns;
    const auto byte = std::to_integer<unsigned>(planes[column / columns * 64 + 4 * lane + within % 4]);
    const unsigned field = byte >> (static_cast<std::size_t>(width) * (within / 4)) & ((1u << width) - 1);
    code |= field << shift;
    shift += width;
    planes += padded * kTileRows * static_cast<std::size_t>(width) / 8;
  }
  return static_cast<int>(code);
}

int u8_at(const std::byte* data, std::size_t index) { return std::to_integer<int>(data[index]); }

// 2^(code - 128), from its bits.
float half_power(int code) {
  return code < 2 ? std::ldexp(1.0f, code - 128) : std::bit_cast<float>((code - 1) << 23);
}

// What the code of one column stands for in steps of its scale, and what its group takes besides.
struct Column {
  int value;
  int scale = 1;
  int minimum = 1;
};

Column column_at(const Format& f, const TileParts& parts, const std::byte* tile, std::size_t lane,
                 std::size_t padded, std::size_t column) {
  const std::size_t at = column / static_cast<std::size_t>(f.group) * kTileRows + lane;
  const int code = code_at(tile, f.bits, padded, lane, column);
  Column c{code};
  if (f.codebook != Codebook::none) c.value = codebook_values(f.codebook)[static_cast<std::size_t>(code)];
  if (f.codebook == Codebook::none && f.zero == ZeroType::none) c.value -= 1 << (f.bits - 1);
  if (f.zero == ZeroType::u8) c.value -= u8_at(tile + parts.zeros, at);
  if (f.zero == ZeroType::min_u8) c.minimum = u8_at(tile + parts.group_minima, at);
  if (f.zero == ZeroType::min_u4) c.minimum = u8_at(tile + parts.group_scales, at) >> 4;
  if (f.scale == ScaleType::i8) c.scale = static_cast<std::int8_t>(u8_at(tile + parts.group_scales, at));
  if (f.scale == ScaleType::u4) c.scale = u8_at(tile + parts.group_scales, at) & 15;
  if (f.scale == ScaleType::u4x2) {
    const std::size_t group = column / static_cast<std::size_t>(f.group);
    c.scale = u8_at(tile + parts.group_scales, group / 2 * kTileRows + lane) >> (group % 2 * 4) & 15;
  }
  return c;
}

float integer_dot(const Format& f, const std::byte* tile, std::size_t lane, const QuantizedRows& x,
                  std::size_t x_row, std::size_t padded) {
  const TileParts parts = tile_parts(f, padded);
  const std::size_t x_groups = x.padded / kActivationGroup;
  float sum = 0;
  for (std::size_t group = 0; group < padded / kActivationGroup; ++group) {
    const std::size_t block = group * kActivationGroup / static_cast<std::size_t>(f.block) * kTileRows + lane;
    std::int32_t dot = 0, minima = 0;
    for (std::size_t i = 0; i < kActivationGroup; ++i) {
      const std::size_t column = group * kActivationGroup + i;
      const Column c = column_at(f, parts, tile, lane, padded, column);
      const int code = x.codes[x_row * x.padded + column];
      dot += c.scale * c.value * code;
      minima += c.minimum * code;
    }
    const float scale = f.scale == ScaleType::e8m0 ? half_power(u8_at(tile + parts.scales, block))
                                                   : load_element(FormatId::f16, tile + parts.scales, block);
    const float x_scale = x.scales[x_row * x_groups + group];
    const float product = (scale * x_scale) * static_cast<float>(dot);
    if (f.has_minima()) {
      const float minimum = load_element(FormatId::f16, tile + parts.zeros, block);
      sum += product - (minimum * x_scale) * static_cast<float>(minima);
    } else {
      sum += product;
    }
  }
  return sum;
}

void matmul(const MatMul& work, std::size_t tile_begin, std::size_t tile_end) {
  const Format& f = format(work.format);
  const std::size_t stride = tile_bytes(f, work.cols), padded = padded_cols(f, work.cols);
  for (std::size_t row = tile_begin * kTileRows; row < std::min(tile_end * kTileRows, work.rows); ++row) {
    const std::byte* tile = work.weights + row / kTileRows * stride;
    const std::size_t lane = row % kTileRows;
    for (std::size_t m = 0; m < work.m; ++m) {
      const std::size_t x_row = work.gather ? static_cast<std::size_t>(work.gather[m]) : m;
      const float sum = f.is_float() ? float_dot(f.id, tile, lane, work.x + x_row * work.x_stride, work.cols)
                                     : integer_dot(f, tile, lane, work.quantized, x_row, padded);
      work.y[m * work.y_stride + row] = work.bias ? sum + work.bias[row] : sum;
    }
  }
}

// A group with NaN or Inf gets codes 0 and that value as scale, so that its products are NaN.
void quantize(const float* x, std::size_t cols, std::size_t padded, std::int8_t* codes, float* scales,
              GroupSum* sums) {
  for (std::size_t group = 0; group < padded / kActivationGroup; ++group) {
    const std::size_t begin = group * kActivationGroup, end = begin + kActivationGroup;
    std::uint32_t largest = 0;  // as bits, which order |x| with NaN above all
    for (std::size_t i = begin; i < std::min(end, cols); ++i) {
      largest = std::max(largest, std::bit_cast<std::uint32_t>(std::fabs(x[i])));
    }
    const float scale = std::bit_cast<float>(largest) / 127.0f;
    GroupSum sum;
    for (std::size_t i = begin; i < end; ++i) {
      const bool coded = i < cols && scale > 0 && std::isfinite(scale);
      const float code = coded ? std::clamp(x[i] / scale, -127.0f, 127.0f) : 0.0f;
      codes[i] = static_cast<std::int8_t>(std::nearbyint(code));
      sum.all += codes[i];
      if (i - begin < kActivationGroup / 2) sum.first_half += codes[i];
    }
    scales[group] = scale;
    sums[group] = sum;
  }
}

void rms_norm(const float* x, const float* weight, std::size_t n, float eps, float* y) {
  float squares = 0;
  for (std::size_t i = 0; i < n; ++i) squares += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(squares / static_cast<float>(n) + eps);
  for (std::size_t i = 0; i < n; ++i) y[i] = x[i] * scale * (weight != nullptr ? weight[i] : 1);
}

void layer_norm(const float* x, const float* weight, const float* bias, std::size_t n, float eps, float* y) {
  float sum = 0, squares = 0;
  for (std::size_t i = 0; i < n; ++i) sum += x[i];
  const float mean = sum / static_cast<float>(n);
  for (std::size_t i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / std::sqrt(squares / static_cast<float>(n) + eps);
  for (std::size_t i = 0; i < n; ++i) y[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

void silu_mul(float* gate, const float* up, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) gate[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

void sigmoid_mul(float* x, const float* gate, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) x[i] /= 1.0f + std::exp(-gate[i]);
}

// 0.5 (1 + tanh(z)) is the sigmoid of 2z.
void gelu_tanh_mul(float* gate, const float* up, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) {
    const float g = gate[i];
    gate[i] = g / (1.0f + std::exp(-1.5957691216f * g * (1.0f + 0.044715f * g * g))) * up[i];
  }
}

void clamped_swiglu(float* gate, const float* up, std::size_t n, float alpha, float limit) {
  for (std::size_t i = 0; i < n; ++i) {
    const float g = gate[i] > limit ? limit : gate[i];
    gate[i] = g / (1.0f + std::exp(-alpha * g)) * (std::clamp(up[i], -limit, limit) + 1);
  }
}

void softmax_with(float* x, std::size_t n, const float* sink) {
  float largest = *std::max_element(x, x + n);
  if (sink != nullptr) largest = std::max(largest, *sink);
  float sum = 0;
  for (std::size_t i = 0; i < n; ++i) sum += x[i] = std::exp(x[i] - largest);
  if (sink != nullptr) sum += std::exp(*sink - largest);
  for (std::size_t i = 0; i < n; ++i) x[i] /= sum;
}

void softmax(float* x, std::size_t n) { softmax_with(x, n, nullptr); }

// Scores of one query over positions [begin, end).
void score(const Attention& work, const float* query, std::int64_t begin, std::int64_t end) {
  const auto dim = static_cast<std::size_t>(work.head_dim);
  QuantizedRows x;
  x.padded = padded_cols(format(FormatId::int8), dim);
  const std::size_t groups = x.padded / kActivationGroup;
  if (work.kv_type == KvType::int8) {
    x.scales = work.scratch + (work.end_block() - work.first_block()) * kKvBlockTokens;
    x.sums = reinterpret_cast<GroupSum*>(x.scales + groups);
    x.codes = reinterpret_cast<std::int8_t*>(x.sums + groups);
    quantize(query, dim, x.padded, x.codes, x.scales, x.sums);
  }
  for (std::int64_t at = begin; at < end; ++at) {
    const std::byte* keys = work.blocks[at / kKvBlockTokens] + work.key_offset;
    const auto lane = static_cast<std::size_t>(at % kKvBlockTokens);
    work.scratch[at - begin] =
        work.kv_type == KvType::int8
            ? integer_dot(format(FormatId::int8), keys, lane, x, 0, x.padded)
            : float_dot(work.kv_type == KvType::f32 ? FormatId::f32 : FormatId::f16, keys, lane, query, dim);
  }
}

float value_at(const Attention& work, std::int64_t position, std::size_t i) {
  const std::byte* values = work.blocks[position / kKvBlockTokens] + work.value_offset;
  const auto slot = static_cast<std::size_t>(position % kKvBlockTokens);
  const auto dim = static_cast<std::size_t>(work.value_dim);
  const std::size_t stride = (dim + 15) / 16 * 16;
  const std::size_t at = slot * stride + i;
  if (work.kv_type == KvType::f32) return load_element(FormatId::f32, values, at);
  if (work.kv_type == KvType::f16) return load_element(FormatId::f16, values, at);
  const std::size_t groups = (dim + kActivationGroup - 1) / kActivationGroup;
  const std::byte* scales = values + stride * kKvBlockTokens;
  return static_cast<float>(std::to_integer<int>(values[at]) - 128) *
         load_element(FormatId::f32, scales, slot * groups + i / kActivationGroup);
}

void attention_row(const Attention& work, int row, const float* query, const float* sink, float* out) {
  const std::int64_t begin = work.begin(row), end = work.end + row;
  score(work, query, begin, end);
  softmax_with(work.scratch, static_cast<std::size_t>(end - begin), sink);
  for (std::size_t i = 0; i < static_cast<std::size_t>(work.value_dim); ++i) {
    float sum = 0;
    for (std::int64_t at = begin; at < end; ++at) sum += work.scratch[at - begin] * value_at(work, at, i);
    out[i] = sum;
  }
}

void attention(const Attention& work) {
  for (int row = 0; row < work.rows; ++row) {
    const float* queries = work.queries + static_cast<std::size_t>(row) * work.query_stride;
    float* out = work.out + static_cast<std::size_t>(row) * work.out_stride;
    for (int head = 0; head < work.group; ++head) {
      attention_row(work, row, queries + head * work.head_dim,
                    work.sinks == nullptr ? nullptr : work.sinks + head, out + head * work.value_dim);
    }
  }
}

void store_element(KvType type, float value, std::byte* data, std::size_t index) {
  if (type == KvType::f32) {
    std::memcpy(data + index * sizeof value, &value, sizeof value);
  } else {
    const std::uint16_t half = float_to_half(value);
    std::memcpy(data + index * sizeof half, &half, sizeof half);
  }
}

// Codes of one group of 32 columns of x [n] that begins at `i`; returns their scale.
float code_group(const float* x, int n, int i, std::byte (&codes)[kActivationGroup]) {
  std::int8_t signed_codes[kActivationGroup];
  float scale;
  GroupSum sum;
  quantize(x + i, static_cast<std::size_t>(std::min(n - i, kActivationGroup)), kActivationGroup, signed_codes,
           &scale, &sum);
  for (int j = 0; j < kActivationGroup; ++j) codes[j] = static_cast<std::byte>(signed_codes[j] + 128);
  return scale;
}

void store_int8(const float* key, const float* value, int head_dim, int value_dim, int slot, std::byte* keys,
                std::byte* values) {
  std::byte codes[kActivationGroup];
  std::byte* const key_scales =
      keys + padded_cols(format(FormatId::int8), static_cast<std::size_t>(head_dim)) * kTileRows;
  for (int i = 0; i < head_dim; i += kActivationGroup) {
    const float scale = code_group(key, head_dim, i, codes);
    for (int j = 0; j < kActivationGroup; ++j) keys[(i + j) / 4 * 64 + 4 * slot + j % 4] = codes[j];
    const auto at = static_cast<std::size_t>(i / kActivationGroup * kTileRows + slot);
    store_element(KvType::f16, scale, key_scales, at);
  }
  const int stride = (value_dim + 15) / 16 * 16,
            groups = (value_dim + kActivationGroup - 1) / kActivationGroup;
  for (int i = 0; i < value_dim; i += kActivationGroup) {
    const float scale = code_group(value, value_dim, i, codes);
    std::copy_n(codes, std::min(stride - i, kActivationGroup), values + slot * stride + i);
    const auto at = static_cast<std::size_t>(slot * groups + i / kActivationGroup);
    store_element(KvType::f32, scale, values + stride * kKvBlockTokens, at);
  }
}

void store_kv(const float* key, const float* value, int head_dim, int value_dim, KvType type, int slot,
              std::byte* keys, std::byte* values) {
  if (type == KvType::int8) return store_int8(key, value, head_dim, value_dim, slot, keys, values);
  const int value_stride = (value_dim + 15) / 16 * 16;
  for (int i = 0; i < head_dim; ++i) {
    store_element(type, key[i], keys, static_cast<std::size_t>(i * kKvBlockTokens + slot));
  }
  for (int i = 0; i < value_dim; ++i) {
    store_element(type, value[i], values, static_cast<std::size_t>(slot * value_stride + i));
  }
}

void convolution(const Convolution& work, std::size_t strip_begin, std::size_t strip_end) {
  const auto width = static_cast<std::size_t>(work.width);
  const std::size_t end = std::min(strip_end * kTileRows, work.channels);
  for (std::size_t c = strip_begin * kTileRows; c < end; ++c) {
    const float* weights = work.weights + c / kTileRows * kTileRows * width + c % kTileRows;
    float window[kMaxConvolution] = {};
    for (std::size_t k = 0; work.history && k + 1 < width; ++k)
      window[k] = work.history[k * work.channels + c];
    for (std::size_t r = 0; r < static_cast<std::size_t>(work.rows); ++r) {
      window[width - 1] = work.x[r * work.x_stride + c];
      float sum = work.bias ? work.bias[c] : 0.0f;
      for (std::size_t k = 0; k < width; ++k) sum += weights[k * kTileRows] * window[k];
      work.y[r * work.y_stride + c] = work.silu ? sum / (1.0f + std::exp(-sum)) : sum;
      std::copy(window + 1, window + width, window);
    }
    for (std::size_t k = 0; k + 1 < width; ++k) work.next_history[k * work.channels + c] = window[k];
  }
}

// Column i of the state, over all rows.
void delta_column(const DeltaRule& work, std::size_t i) {
  const auto dim = static_cast<std::size_t>(work.key_dim);
  const std::size_t at = i / kTileRows * kTileRows * dim + i % kTileRows;
  float* const state = work.next_state + at;
  for (std::size_t k = 0; k < dim; ++k)
    state[k * kTileRows] = work.state ? work.state[at + k * kTileRows] : 0.0f;
  for (std::size_t r = 0; r < static_cast<std::size_t>(work.rows); ++r) {
    const float* query = work.queries + r * work.row_stride;
    const float* key = work.keys + r * work.row_stride;
    float remembered = 0, out = 0;
    for (std::size_t k = 0; k < dim; ++k) {
      state[k * kTileRows] *= work.decay[r * work.gate_stride];
      remembered += state[k * kTileRows] * key[k];
    }
    const float delta = work.beta[r * work.gate_stride] * (work.values[r * work.row_stride + i] - remembered);
    for (std::size_t k = 0; k < dim; ++k) {
      state[k * kTileRows] += key[k] * delta;
      out += state[k * kTileRows] * query[k];
    }
    work.out[r * work.out_stride + i] = out;
  }
}

void delta_rule(const DeltaRule& work) {
  for (std::size_t i = 0; i < static_cast<std::size_t>(work.value_dim); ++i) delta_column(work, i);
}

std::uint64_t dot_rounds(std::uint64_t rounds) {
  constexpr int kSums = 8;
  std::int32_t sums[kSums] = {}, code = 1, input = 1;
  for (std::uint64_t round = 0; round < rounds; ++round) {
    for (std::int32_t& sum : sums) {
      asm volatile("" : "+r"(code), "+r"(input));
      sum += code * input;
    }
  }
  for (const std::int32_t& sum : sums) asm volatile("" : : "m"(sum));
  return rounds * kSums;
}

}  // namespace

constinit const KernelTable scalar_table = {.name = "scalar",
                                            .matmul = matmul,
                                            .quantize = quantize,
                                            .rms_norm = rms_norm,
                                            .layer_norm = layer_norm,
                                            .silu_mul = silu_mul,
                                            .gelu_tanh_mul = gelu_tanh_mul,
                                            .clamped_swiglu = clamped_swiglu,
                                            .sigmoid_mul = sigmoid_mul,
                                            .softmax = softmax,
                                            .attention = attention,
                                            .store_kv = store_kv,
                                            .convolution = convolution,
                                            .delta_rule = delta_rule,
                                            .dot_rounds = dot_rounds};

}  // namespace edgert
