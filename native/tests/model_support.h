// What the tests of a whole model share.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <vector>

#include "engine/model.h"

namespace edgert::test {

inline std::vector<std::int32_t> some_tokens(int count, int vocab, int seed = 1) {
  std::vector<std::int32_t> tokens;
  for (int i = 0; i < count; ++i) tokens.push_back((seed * 37 + i * i * 11 + i * 5) % vocab);
  return tokens;
}

inline std::shared_ptr<Runtime> make_runtime(std::uint64_t memory = 1 << 30, int threads = 1) {
  RuntimeOptions options;
  options.memory_bytes = memory;
  options.threads = threads;
  options.io_threads = 2;
  return std::make_shared<Runtime>(options);
}

// Of every token, one behind the other.
inline std::vector<float> all_logits(Model& model, const std::vector<std::int32_t>& tokens) {
  std::vector<float> out;
  const auto sequence = model.sequence();
  const StepRow row{sequence.get(), tokens, Wanted::all};
  model.step(std::span(&row, 1),
             [&](std::size_t, std::size_t, std::span<float> l) { out.insert(out.end(), l.begin(), l.end()); },
             {});
  return out;
}

// The least memory that works.
inline std::uint64_t minimum(const std::filesystem::path& path, const ModelOptions& options,
                             int threads = 1) {
  return Model(make_runtime(1 << 30, threads), path, options).plan().minimum_bytes;
}

}  // namespace edgert::test
