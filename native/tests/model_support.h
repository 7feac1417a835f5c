// What the tests of a whole model share.
#pragma once

#include <doctest/doctest.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <utility>
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
inline std::vector<float> all_logits(Model& model, KvSequence& sequence,
                                     std::span<const std::int32_t> tokens) {
  std::vector<float> out;
  const StepRow row{&sequence, tokens, Wanted::all};
  model.step(std::span(&row, 1),
             [&](std::size_t, std::size_t, std::span<float> l) { out.insert(out.end(), l.begin(), l.end()); },
             {});
  return out;
}

inline std::vector<float> all_logits(Model& model, const std::vector<std::int32_t>& tokens,
                                     AdapterMix mix = {}) {
  return all_logits(model, *model.sequence(std::move(mix)), tokens);
}

// Sequences of all mixes share a step, and each has the logits that it has alone.
inline void check_shared_step(Model& model, const std::vector<AdapterMix>& mixes, int vocab) {
  std::vector<std::vector<std::int32_t>> tokens;
  std::vector<std::vector<float>> alone, together(mixes.size());
  std::vector<std::shared_ptr<KvSequence>> sequences;
  std::vector<StepRow> rows;
  for (std::size_t i = 0; i < mixes.size(); ++i) {
    tokens.push_back(some_tokens(5 + static_cast<int>(i), vocab, static_cast<int>(i)));
    alone.push_back(all_logits(model, tokens[i], mixes[i]));
    sequences.push_back(model.sequence(mixes[i]));
  }
  for (std::size_t i = 0; i < mixes.size(); ++i) rows.push_back({sequences[i].get(), tokens[i], Wanted::all});
  model.step(rows,
             [&](std::size_t row, std::size_t, std::span<float> l) {
               together[row].insert(together[row].end(), l.begin(), l.end());
             },
             {});
  for (std::size_t i = 0; i < mixes.size(); ++i) CHECK(together[i] == alone[i]);
}

// The least memory that works.
inline std::uint64_t minimum(const std::filesystem::path& path, const ModelOptions& options,
                             int threads = 1) {
  return Model(make_runtime(1 << 30, threads), path, options).plan().minimum_bytes;
}

}  // namespace edgert::test
