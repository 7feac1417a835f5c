#include "kernels/kernels.h"

namespace edgert {
namespace {

std::size_t up(std::size_t n, std::size_t multiple) { return (n + multiple - 1) / multiple * multiple; }
std::size_t groups(std::size_t n) { return up(n, kActivationGroup) / kActivationGroup; }

constexpr std::size_t kTokens = kKvBlockTokens;

std::size_t element_bytes(KvType type) { return type == KvType::f32 ? 4 : type == KvType::f16 ? 2 : 1; }

}  // namespace

std::size_t kv_key_bytes(KvType type, int head_dim) {
  const auto dim = static_cast<std::size_t>(head_dim);
  if (type != KvType::int8) return dim * kTokens * element_bytes(type);
  return tile_bytes(format(FormatId::int8), dim);
}

std::size_t kv_value_bytes(KvType type, int value_dim) {
  const auto dim = static_cast<std::size_t>(value_dim);
  const std::size_t scales = type == KvType::int8 ? groups(dim) * sizeof(float) : 0;
  return (up(dim, 16) * element_bytes(type) + scales) * kTokens;
}

std::size_t attention_scratch(const Attention& work) {
  const auto queries = static_cast<std::size_t>(work.rows * work.group);
  const auto blocks = static_cast<std::size_t>(work.end_block() - work.first_block());
  const std::size_t query_groups = groups(static_cast<std::size_t>(work.head_dim));
  // Scores, and where the cache is int8 the queries' scales, sums and codes.
  const std::size_t coded =
      work.kv_type == KvType::int8 ? query_groups * (3 + kActivationGroup / sizeof(float)) : 0;
  return queries * (blocks * kTokens + coded);
}

std::size_t delta_state_floats(int key_dim, int value_dim) {
  return up(static_cast<std::size_t>(value_dim), kTileRows) * static_cast<std::size_t>(key_dim);
}

}  // namespace edgert
