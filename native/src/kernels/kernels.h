// The arithmetic of a step as one table of function pointers, one table an instruction set.
//
// Threads: every function is pure over its arguments; callers split work by tiles, rows or heads.
// Law 1: a result depends on its own row alone. SIMD lanes are output rows (or tokens of a KV block, or
// elements of a vector at fixed positions); columns accumulate in one fixed order whatever the number of
// activation rows; integer dot products equal the scalar table's exactly.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "quant/format.h"

namespace edgert {

// The sum of the codes of an activation group, and that of its first 16 columns.
struct GroupSum {
  std::int32_t all = 0;
  std::int32_t first_half = 0;
};

// Activation rows as integer products want them: int8 codes in [-127, 127], one f32 scale and the
// sums of the codes for every kActivationGroup columns; columns padded with zeros to `padded`, a multiple
// of kMaxGroup. scale = max|x| / 127 over the group.
struct QuantizedRows {
  std::int8_t* codes = nullptr;  // [rows][padded]
  float* scales = nullptr;       // [rows][padded / kActivationGroup]
  GroupSum* sums = nullptr;      // [rows][padded / kActivationGroup]
  std::size_t padded = 0;
};

struct MatMul {
  FormatId format = FormatId::f32;
  const std::byte* weights = nullptr;  // packed [rows, cols]
  std::size_t rows = 0;
  std::size_t cols = 0;
  const float* x = nullptr;  // float formats: row-major, stride x_stride
  std::size_t x_stride = 0;
  QuantizedRows quantized;               // integer formats
  const std::int32_t* gather = nullptr;  // activation row of output row m is gather[m]; null: m itself
  std::size_t m = 0;                     // activation rows
  const float* bias = nullptr;           // [rows] or null
  float* y = nullptr;                    // y[m * y_stride + row]
  std::size_t y_stride = 0;
  const std::byte* after =
      nullptr;  // weights that the same thread reads next, if that is known: to ask ahead
};

inline constexpr int kKvBlockTokens = 16;
enum class KvType : std::uint8_t { f32, f16, int8 };

// A KV head's 16 tokens lie as
//   f32, f16   keys [head_dim][16 tokens]; values [16 tokens][value_dim padded to 16]
//   int8       keys as an int8 weight tile whose rows are tokens; values as codes + 128 [16 tokens][value_dim
//   padded
//              to 16], then f32 scales [16 tokens][value_dim / 32]. Codes and scales are those of quantize().
std::size_t kv_key_bytes(KvType type, int head_dim);
std::size_t kv_value_bytes(KvType type, int value_dim);

// Some activation rows of one sequence at consecutive positions, and one KV head. A block holds, from
// `key_offset`, keys [head_dim][16 tokens] and, from `value_offset`, values [16 tokens][value_dim padded to
// 16], both of kv_type. Row r attends to [begin(r), end + r).
struct Attention {
  const float* queries = nullptr;  // [rows, query_stride apart][group][head_dim], scaled and rotated
  std::size_t query_stride = 0;
  int rows = 1;
  int group = 1;  // query heads that share the KV head
  int head_dim = 0;
  int value_dim = 0;
  KvType kv_type = KvType::f32;
  const std::byte* const* blocks = nullptr;  // block table of the sequence
  std::size_t key_offset = 0;
  std::size_t value_offset = 0;
  std::int64_t end = 0;     // past the last position of row 0
  std::int64_t window = 0;  // positions that a row attends to at most; 0: all
  std::int64_t start = 0;   // the first position that any row attends to; before end
  const float* sinks =
      nullptr;               // [group], a logit more in each head's softmax, whose share is dropped; or null
  float* scratch = nullptr;  // attention_scratch(*this) floats
  float* out = nullptr;      // [rows, out_stride apart][group][value_dim]
  std::size_t out_stride = 0;

  std::int64_t begin(int row) const noexcept {
    return window == 0 || end + row < start + window ? start : end + row - window;
  }
  std::int64_t first_block() const noexcept { return begin(0) / kKvBlockTokens; }
  std::int64_t end_block() const noexcept { return (end + rows - 1 + kKvBlockTokens - 1) / kKvBlockTokens; }
};
std::size_t attention_scratch(const Attention& work);

// Depthwise causal convolution over consecutive positions of one sequence:
//   y[r][c] = bias[c] + sum over k of weights[c][k] * x[r - (width - 1) + k][c], then silu where asked for.
// Rows before the first one are the history, oldest first; nothing there counts as zeros.
inline constexpr int kMaxConvolution = 8;
struct Convolution {
  const float* x = nullptr;  // [rows, x_stride apart][channels]
  std::size_t x_stride = 0;
  int rows = 1;
  int width = 0;  // 2 to kMaxConvolution
  std::size_t channels = 0;
  const float* weights = nullptr;  // a packed f32 matrix [channels, width]
  const float* bias = nullptr;     // [channels] or null
  bool silu = false;
  const float* history = nullptr;  // [width - 1][channels], or null at the start
  float* next_history = nullptr;   // what follows the last row; may be `history`
  float* y = nullptr;              // [rows, y_stride apart][channels]; not x
  std::size_t y_stride = 0;
};

// The gated delta rule of one head over consecutive positions of one sequence. For each row in turn, with the
// state S [key_dim][value_dim]:
//   S *= decay;  d = beta * (value - key S);  S += key (x) d;  out = query S
// The state lies as [value_dim padded to 16, / 16][key_dim][16].
struct DeltaRule {
  const float* queries = nullptr;  // [rows, row_stride apart][key_dim], likewise keys; normed and scaled
  const float* keys = nullptr;
  const float* values = nullptr;  // [rows, row_stride apart][value_dim]
  std::size_t row_stride = 0;
  const float* decay = nullptr;  // [rows, gate_stride apart]
  const float* beta = nullptr;
  std::size_t gate_stride = 0;
  int rows = 1;
  int key_dim = 0;
  int value_dim = 0;
  const float* state = nullptr;  // null at the start: zeros
  float* next_state = nullptr;   // after the last row; may be `state`
  float* out = nullptr;          // [rows, out_stride apart][value_dim]
  std::size_t out_stride = 0;
};
std::size_t delta_state_floats(int key_dim, int value_dim);  // of one head

struct KernelTable {
  std::string_view name;  // "scalar", "portable", "avx2", "avxvnni", "avx512", "neon", "neon-i8mm"
  // Output rows of tiles [tile_begin, tile_end), every activation row.
  void (*matmul)(const MatMul& work, std::size_t tile_begin, std::size_t tile_end);
  // One row to int8: codes[padded], scales and sums [padded / kActivationGroup].
  void (*quantize)(const float* x, std::size_t cols, std::size_t padded, std::int8_t* codes, float* scales,
                   GroupSum* sums);
  // x may be y; a null weight is one.
  void (*rms_norm)(const float* x, const float* weight, std::size_t n, float eps, float* y);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, std::size_t n, float eps,
                     float* y);                                        // x may be y
  void (*silu_mul)(float* gate, const float* up, std::size_t n);       // gate = silu(gate) * up
  void (*gelu_tanh_mul)(float* gate, const float* up, std::size_t n);  // likewise, in gelu's tanh form
  // gate = g * sigmoid(alpha * g) * (u + 1), with g = min(gate, limit) and u = clamp(up, -limit, limit)
  void (*clamped_swiglu)(float* gate, const float* up, std::size_t n, float alpha, float limit);
  void (*sigmoid_mul)(float* x, const float* gate, std::size_t n);  // x *= sigmoid(gate)
  void (*softmax)(float* x, std::size_t n);                         // in place
  void (*attention)(const Attention& work);
  // Stores one token's key [head_dim] and value [value_dim] of one KV head at `slot` (0..15) of a block.
  void (*store_kv)(const float* key, const float* value, int head_dim, int value_dim, KvType type, int slot,
                   std::byte* keys, std::byte* values);
  // Channels [16 * strip_begin, 16 * strip_end).
  void (*convolution)(const Convolution& work, std::size_t strip_begin, std::size_t strip_end);
  void (*delta_rule)(const DeltaRule& work);
  // int8 dot products on registers alone, as many as the instruction set does; returns the multiply-adds
  // done.
  std::uint64_t (*dot_rounds)(std::uint64_t rounds);
};

// The table for this machine: the best, or the one EDGERT_ISA names. Error{unsupported} for a name that is
// unknown or that this processor cannot run; the message lists those it can.
const KernelTable& kernels();
const KernelTable& kernels(std::string_view name);
std::span<const std::string_view> runnable_kernels();  // scalar first, best last

}  // namespace edgert
