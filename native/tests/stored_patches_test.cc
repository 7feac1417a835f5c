// Patches that a file has do what those do that are compiled of an adapter's numbers, wherever experts are.
#include "adapters/stored_patches.h"

#include <fstream>
#include <random>

#include "adapters/matrix_patch.h"
#include "engine/model.h"
#include "model_support.h"
#include "small_bundle.h"
#include "sparse_sources.h"
#include "support.h"

using namespace edgert;
using test::all_logits;
using test::contains;
using test::error_of;
using test::make_runtime;
using test::minimum;
using test::SmallModel;
using test::some_tokens;
using test::SparseSources;
using test::TemporaryDirectory;

namespace {

struct PackedMatrix {
  FormatId format;
  std::size_t rows, cols;
  std::vector<std::byte> bytes;
};

// A matrix of the bundle, dense or an expert's, as it is packed.
PackedMatrix packed(const Bundle& bundle, const SmallModel& small, const std::string& target) {
  const auto read = [&](const Extent& extent, std::size_t offset, PackedMatrix matrix) {
    matrix.bytes.resize(packed_bytes(format(matrix.format), matrix.rows, matrix.cols));
    bundle.file(extent.file)->read(extent.offset + offset, matrix.bytes);
    return matrix;
  };
  int layer = 0, expert = 0;
  char part[8] = {};
  if (std::sscanf(target.c_str(), "layers.%d.experts.%d.%7s", &layer, &expert, part) != 3) {
    const TensorEntry& tensor = bundle.tensor(target);
    return read(tensor.extent, 0, {tensor.format, tensor.rows, tensor.cols, {}});
  }
  const ExpertEntry& entry =
      bundle.manifest().experts[static_cast<std::size_t>(layer)].experts[static_cast<std::size_t>(expert)];
  const Recipe recipe = parse_recipe(bundle.manifest().recipe, "recipe");
  const auto hidden = static_cast<std::size_t>(small.hidden),
             width = static_cast<std::size_t>(small.intermediate);
  const ExpertLayout at =
      expert_layout(bundle.manifest().expert_formats[entry.formats], hidden, recipe.block(layer).ffn);
  switch (part[0]) {
    case 'g':
      return read(entry.extent, 0, {at.formats.gate, width, hidden, {}});
    case 'u':
      return read(entry.extent, at.up_offset, {at.formats.up, width, hidden, {}});
    default:
      return read(entry.extent, at.down_offset, {at.formats.down, hidden, width, {}});
  }
}

// The patches that they make of the bundle, in a file behind what is not theirs.
PatchFile write_patches(const std::filesystem::path& path, const std::filesystem::path& bundle_path,
                        const SmallModel& small, const SparseSources& sparse) {
  const Bundle bundle = Bundle::open(bundle_path, DirectIo::off);
  PatchFile file;
  std::ofstream out(path, std::ios::binary);
  out << "something else";
  for (const AdapterSource& source : sparse.sources) {
    const PackedMatrix matrix = packed(bundle, small, source.target);
    const MatrixDelta delta{source.rows, source.cols, source.values, source.remainders};
    const auto patch =
        matrix_patch(format(matrix.format), matrix.bytes, matrix.rows, matrix.cols, delta, file.counts);
    file.places.push_back({source.target, static_cast<std::uint64_t>(out.tellp()), patch.size()});
    out.write(reinterpret_cast<const char*>(patch.data()), static_cast<std::streamsize>(patch.size()));
  }
  out.close();
  file.file = File::open(path, DirectIo::off);
  return file;
}

}  // namespace

TEST_CASE("patches of files and of numbers by turns, in memory and paged, with the same logits") {
  const TemporaryDirectory directory;
  SmallModel mixed;
  mixed.expert_formats = {"int8", "int2", "int3"};
  mixed.dense_format = "int4";
  for (const SmallModel& small : {SmallModel(), mixed}) {
    const auto path = test::write_small_bundle(directory.path(), small);
    const SparseSources one(small, 1), two(small, 2);
    const PatchFile files[] = {write_patches(directory.path() / "one", path, small, one),
                               write_patches(directory.path() / "two", path, small, two)};
    const auto tokens = some_tokens(5, small.vocab);
    ModelOptions options;
    options.adapter_bytes = 1 << 20;
    Model paged(make_runtime(minimum(path, options, 2) + (8 << 10), 2), path, options);
    CHECK_FALSE(paged.plan().resident());
    Model whole(make_runtime(1 << 30, 2), path, options);
    for (Model* model : {&whole, &paged}) {
      std::vector<AdapterMix> mixes(1);
      for (const auto& sources : {&one.sources, &two.sources}) {
        AdapterMix& mix = mixes.emplace_back();
        mix.entries = {{model->adapter("numbers", *sources), 1}};
        mix.patch = model->patches(mix);
      }
      std::vector<std::vector<float>> expected;
      for (std::size_t i = 0; i < 3; ++i) expected.push_back(all_logits(*model, tokens, mixes[i]));
      CHECK(expected[0] != expected[1]);
      CHECK(expected[1] != expected[2]);
      for (const bool keep : {true, false}) {
        for (std::size_t i = 0; i < 2; ++i) {
          const auto adapter =
              model->stored_adapter("stored", 0, mixes[i + 1].entries[0].adapter->fingerprint());
          mixes.push_back({{{adapter, 1}}, model->patches(adapter, files[i], keep)});
          CHECK(mixes.back().fingerprint() == mixes[i + 1].fingerprint());
        }
      }
      std::mt19937 random(3);
      for (int turn = 0; turn < 60; ++turn) {
        const std::size_t i = random() % mixes.size();
        if (random() % 4 == 0 && mixes[i].patch != nullptr) {
          model->remove(mixes[i].patch);
        } else {
          CHECK(all_logits(*model, tokens, mixes[i]) == expected[i == 0 ? 0 : (i - 1) % 2 + 1]);
        }
      }
      CHECK(model->statistics().patch_bytes_read > 0);
      CHECK(model->check_weights() > 10);
      CHECK(all_logits(*model, tokens, {}) == expected[0]);
    }
  }
}

TEST_CASE("patches of files that cannot be") {
  const TemporaryDirectory directory;
  const SmallModel small;
  const auto path = test::write_small_bundle(directory.path(), small);
  const SparseSources sparse(small, 1);
  const PatchFile good = write_patches(directory.path() / "one", path, small, sparse);
  Model model(make_runtime(1 << 30, 2), path, {});
  const auto adapter = model.stored_adapter("stored", 0, 1);
  const auto refused = [&](ErrorKind kind, const auto& change) {
    PatchFile file = good;
    change(file.places[1]);
    return error_of(kind, [&] { model.patches(adapter, file, true); });
  };
  CHECK(
      contains(refused(ErrorKind::corrupt, [](auto& place) { place.bytes = UINT64_MAX - 7; }), "cannot be"));
  CHECK(
      contains(refused(ErrorKind::corrupt, [](auto& place) { place.offset = UINT64_MAX - 8; }), "cannot be"));
  CHECK(contains(refused(ErrorKind::corrupt, [](auto& place) { place.bytes -= 4; }), "cannot be"));
  CHECK(contains(refused(ErrorKind::corrupt, [](auto& place) { place.target = "layers.0.attention.o"; }),
                 "of the same matrix"));
  CHECK(contains(refused(ErrorKind::corrupt, [](auto& place) { place.target = "final_norm"; }),
                 "cannot be changed"));
  CHECK(contains(refused(ErrorKind::invalid_argument, [](auto& place) { place.target = "layers.9.ffn.up"; }),
                 "layers.9"));
  // Bytes of two: found when they are read.
  PatchFile moved = good;
  for (auto& place : moved.places) place.offset -= 8;
  AdapterMix mix{{{adapter, 1}}, model.patches(adapter, moved, true)};
  const auto tokens = some_tokens(5, small.vocab);
  const auto plain = all_logits(model, tokens, {});
  CHECK(contains(error_of(ErrorKind::corrupt, [&] { all_logits(model, tokens, mix); }), "checksum differs"));
  CHECK(all_logits(model, tokens, {}) == plain);
  CHECK(model.check_weights() > 10);
}
