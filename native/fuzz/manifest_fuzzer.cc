// Manifests and their recipes: whatever the text, the answer is an Error or a manifest that keeps its
// promises.
//
//     edgert_fuzz_manifest CORPUS -runs=1000000          (libFuzzer; its options)
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "bundle/manifest_parse.h"
#include "json_mutator.h"
#include "model/recipe.h"
#include "platform/error.h"

namespace {

using namespace edgert;

void require(bool held, const char* promise) {
  if (held) return;
  std::fprintf(stderr, "not kept: %s\n", promise);
  std::abort();
}

void check_extent(const Manifest& manifest, const Extent& extent, std::uint64_t alignment) {
  require(extent.file < manifest.files.size(), "an extent is in one of the files");
  require(extent.offset % alignment == 0, "an extent is aligned");
  require(extent.bytes > 0 && extent.offset + extent.bytes <= manifest.files[extent.file].bytes,
          "an extent is inside its file");
}

void check(const Manifest& manifest) {
  for (const auto& [name, tensor] : manifest.tensors) {
    check_extent(manifest, tensor.extent, 64);
    require(tensor.rows > 0 && tensor.cols > 0, "a tensor has elements");
  }
  for (const auto& layer : manifest.experts) {
    for (const ExpertEntry& expert : layer.experts) {
      check_extent(manifest, expert.extent, manifest.alignment);
      require(expert.formats < manifest.expert_formats.size(), "an expert has formats");
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    const Manifest manifest = parse_manifest(text, "manifest.json");
    check(manifest);
    parse_recipe(manifest.recipe, "manifest.json: recipe");
  } catch (const Error& error) {
    require(std::strlen(error.what()) < 4096, "a message is short");
  }
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size,
                                               unsigned int seed) {
  const std::string text = edgert::fuzz::mutate_json({reinterpret_cast<const char*>(data), size}, seed);
  const std::size_t length = std::min(text.size(), max_size);
  std::memcpy(data, text.data(), length);
  return length;
}
