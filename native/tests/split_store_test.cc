// Experts that are stored as base and refinement: what is read, what it weighs, and that the whole is the
// whole.
#include <cstring>
#include <fstream>
#include <iterator>

#include "bundle/xxhash.h"
#include "engine/model.h"
#include "model/split_expert.h"
#include "model_support.h"
#include "store_support.h"

using namespace edgert;
using test::make_runtime;
using test::SmallModel;
using test::TemporaryDirectory;

namespace {

SmallModel split_model(std::vector<std::string> formats = {"int4"}) {
  SmallModel small;
  small.expert_formats = std::move(formats);
  small.split_experts = true;
  // Large enough that a base fills fewer pages than its expert.
  small.hidden = 128;
  small.intermediate = 96;
  return small;
}

const std::vector<std::uint8_t> kBase{1};

struct Fixture {
  explicit Fixture(std::uint64_t slots)
      : bundle(Bundle::open(test::write_small_bundle(directory.path(), split_model()), DirectIo::off)),
        recipe(recipe_of(bundle)),
        store(bundle, budget, reader, slots * slot, Eviction::lru,
              [this](int layer, std::uint32_t, auto base, auto refinement, auto out) {
                join_expert(layout, hidden, recipe.block(layer).ffn, base, refinement, out);
                return layout.whole.bytes;
              }) {}

  // The lease of one expert, its read completed.
  struct Taken {
    bool base;
    std::vector<std::byte> bytes;
  };
  Taken take(int expert, bool base_suffices) {
    const auto request = store.acquire(0, std::vector{expert}, cancelled,
                                       base_suffices ? std::span(kBase) : std::span<const std::uint8_t>());
    reader.complete_all();
    const auto lease = request->next();
    const std::size_t bytes = lease->base() ? layout.base.bytes : layout.whole.bytes;
    return {lease->base(), {lease->data(), lease->data() + bytes}};
  }

  // An expert as the same model has it unsplit.
  std::vector<std::byte> unsplit(int expert) const {
    const TemporaryDirectory other;
    SmallModel small = split_model();
    small.split_experts = false;
    const Bundle plain = Bundle::open(test::write_small_bundle(other.path(), small), DirectIo::off);
    const Extent& extent = plain.manifest().experts[0].experts[static_cast<std::size_t>(expert)].extent;
    std::vector<std::byte> bytes(extent.bytes);
    plain.file(extent.file)->read(extent.offset, bytes);
    return bytes;
  }

  TemporaryDirectory directory;
  Bundle bundle;
  Recipe recipe;
  std::size_t hidden = 128;
  SplitLayout layout = split_layout(bundle.manifest().expert_formats[0], hidden, recipe.block(0).ffn);
  const ExpertEntry& entry = bundle.manifest().experts[0].experts[0];
  std::uint64_t slot = ExpertStore::slot_bytes(entry);
  std::uint64_t base_slot = round_up(layout.base.bytes, 4096);
  std::shared_ptr<Budget> budget = std::make_shared<Budget>(1 << 30);
  test::ManualReader reader;
  std::atomic<bool> cancelled{false};
  ExpertStore store;
};

}  // namespace

TEST_CASE("a whole expert is read at once, and is the very one of the unsplit bundle") {
  Fixture f(3);
  const auto taken = f.take(2, false);
  CHECK_FALSE(taken.base);
  CHECK(taken.bytes == f.unsplit(2));
  CHECK(f.reader.reads == 1);
  CHECK(f.store.statistics().demand_bytes == f.slot);
  CHECK(f.store.statistics().base_reads == 0);
}

TEST_CASE("where the base suffices it alone is read and charged, and serves again") {
  Fixture f(3);
  const auto taken = f.take(2, true);
  CHECK(taken.base);
  const ExpertStatistics s = f.store.statistics();
  CHECK(s.demand_bytes == f.base_slot);
  CHECK(s.slot_bytes == f.base_slot);
  CHECK(s.resident == 1);
  CHECK(s.base_reads == 1);
  CHECK(f.base_slot * 10 < f.slot * 7);
  CHECK(f.take(2, true).bytes == taken.bytes);
  CHECK(f.store.statistics().hits == 1);
  CHECK(f.reader.reads == 1);
}

TEST_CASE("a base becomes whole by a read of its refinement") {
  Fixture f(3);
  f.take(2, true);
  const auto taken = f.take(2, false);
  CHECK_FALSE(taken.base);
  CHECK(taken.bytes == f.unsplit(2));
  const ExpertStatistics s = f.store.statistics();
  CHECK(s.misses == 2);
  CHECK(s.refinements == 1);
  CHECK(s.demand_bytes <= f.slot);
  CHECK(s.slot_bytes == f.slot);  // the base's is free again
  CHECK(s.resident == 1);
  CHECK(s.evictions == 0);
  CHECK_FALSE(f.take(2, true).base);  // what is whole serves all
  CHECK(f.reader.reads == 2);
}

TEST_CASE("without room beside it, a base goes for the whole") {
  Fixture f(2);
  f.take(0, true);
  f.take(1, true);
  f.take(2, true);
  const auto request = f.store.acquire(0, std::vector{0, 1, 2}, f.cancelled);
  std::set<int> seen;
  while (true) {
    f.reader.complete_all();
    const auto lease = request->next();
    if (!lease) break;
    CHECK_FALSE(lease->base());
    CHECK(std::memcmp(lease->data(), f.unsplit(lease->expert()).data(), f.layout.whole.bytes) == 0);
    seen.insert(lease->expert());
    CHECK(f.store.statistics().slot_bytes <= 2 * f.slot);
  }
  CHECK(seen == std::set<int>{0, 1, 2});
}

TEST_CASE("one who wants the whole waits for a base under way and goes on from it") {
  Fixture f(3);
  const auto light = f.store.acquire(0, std::vector{2}, f.cancelled, kBase);
  const auto heavy = f.store.acquire(0, std::vector{2}, f.cancelled);
  f.reader.complete_all();
  {
    const auto lease = light->next();
    CHECK(lease->base());
    CHECK_FALSE(heavy->next_ready().has_value());  // somebody computes with the base
  }
  CHECK_FALSE(heavy->next_ready().has_value());
  f.reader.complete_all();
  const auto lease = heavy->next();
  CHECK_FALSE(lease->base());
  CHECK(std::memcmp(lease->data(), f.unsplit(2).data(), f.layout.whole.bytes) == 0);
}

TEST_CASE("a base, a refinement and a whole are each checked, and read twice before that is an error") {
  for (const bool base : {true, false}) {
    Fixture f(3);
    f.reader.spoil = 1;
    CHECK(f.take(2, base).base == base);
    CHECK(f.reader.reads == 2);
    f.reader.spoil = 2;
    CHECK(test::contains(test::error_of(ErrorKind::corrupt, [&] { f.take(3, base); }), "checksum differs"));
    CHECK(f.store.statistics().slot_bytes == (base ? f.base_slot : f.slot));
  }
  Fixture f(3);
  f.take(2, true);
  f.reader.spoil = 2;
  CHECK(test::contains(test::error_of(ErrorKind::corrupt, [&] { f.take(2, false); }), "checksum differs"));
  CHECK(f.store.statistics().slot_bytes == 0);
  CHECK(f.take(2, false).bytes == f.unsplit(2));
}

TEST_CASE("a refinement that the reader does not take leaves the base as it was") {
  Fixture f(3);
  const auto base = f.take(2, true);
  f.reader.refuse = 1;
  CHECK(test::contains(test::error_of(ErrorKind::io, [&] { f.take(2, false); }), "no room in the queue"));
  CHECK(f.store.statistics().slot_bytes == f.base_slot);
  CHECK(f.take(2, true).bytes == base.bytes);
}

TEST_CASE("the page-in hook sees experts that are whole, and no base") {
  Fixture f(3);
  std::size_t patched = 0;
  f.store.set_page_in_hook([&](const ExpertStore::Expert&, std::span<std::byte> bytes) {
    patched = bytes.size();
    return nullptr;
  });
  CHECK(f.take(2, true).base);
  CHECK(patched == 0);
  CHECK_FALSE(f.take(2, false).base);
  CHECK(patched == f.layout.whole.bytes);
}

TEST_CASE("what joining takes is charged") {
  Fixture f(3);
  CHECK(ExpertStore::join_bytes(f.bundle.manifest()) == round_up(f.layout.base.bytes, page_size()));
  const TemporaryDirectory other;
  const Bundle plain = Bundle::open(test::write_small_bundle(other.path(), {}), DirectIo::off);
  CHECK(ExpertStore::join_bytes(plain.manifest()) == 0);
}

// --- in a model ---------------------------------------------------------------------------------------

namespace {

std::vector<float> all_logits(Model& model) { return test::all_logits(model, test::some_tokens(50, 67)); }

ModelOptions options(int chunk, const LossyModes& modes = {}) {
  ModelOptions out;
  out.chunk = chunk;
  out.lossy = modes;
  return out;
}

}  // namespace

TEST_CASE("a split bundle computes the bits of the unsplit one, at any budget") {
  const TemporaryDirectory directory, other;
  SmallModel small = split_model({"int4", "int8", "int4_32"});
  const auto split = test::write_small_bundle(directory.path(), small);
  small.split_experts = false;
  const auto plain = test::write_small_bundle(other.path(), small);
  Model whole(make_runtime(1 << 30), plain, options(64));
  const auto expected = all_logits(whole);
  for (const int chunk : {1, 7, 64}) {
    const std::uint64_t least = Model(make_runtime(1 << 30, 2), split, options(chunk)).plan().minimum_bytes;
    Model model(make_runtime(least, 2), split, options(chunk));
    CHECK(all_logits(model) == expected);
    CHECK(model.statistics().experts.base_reads == 0);
  }
}

TEST_CASE("in low precision fewer bytes are read, and turned off the bits are exact again") {
  const TemporaryDirectory directory;
  SmallModel small = split_model();
  small.experts = 12;
  small.per_token = 4;
  const auto path = test::write_small_bundle(directory.path(), small);
  const MemoryPlan plan = Model(make_runtime(1 << 30), path, options(1)).plan();
  const std::uint64_t memory = plan.minimum_bytes + plan.expert_bytes / 4;
  Model exact(make_runtime(memory), path, options(1));
  const auto expected = all_logits(exact);
  Model model(make_runtime(memory), path, options(1, {.low_precision_misses = 0.3F}));
  CHECK(all_logits(model) != expected);
  const ModelStatistics s = model.statistics();
  CHECK(s.lossy.low_precision > 0);
  CHECK(s.lossy.replaced + s.lossy.skipped == 0);
  CHECK(s.experts.base_reads > 0);
  CHECK(s.experts.refinements > 0);
  CHECK(s.experts.demand_bytes < exact.statistics().experts.demand_bytes);
  CHECK(s.experts.slot_bytes <= s.experts.capacity_bytes);
  model.set_lossy({});
  CHECK(all_logits(model) == expected);
}

TEST_CASE("an unsplit bundle has no low precision to offer") {
  const TemporaryDirectory directory;
  const auto path = test::write_small_bundle(directory.path(), {});
  Model model(make_runtime(1 << 30), path, options(1, {.low_precision_misses = 1}));
  Model exact(make_runtime(1 << 30), path, options(1));
  CHECK(all_logits(model) == all_logits(exact));
  CHECK(model.statistics().lossy.low_precision == 0);
}

TEST_CASE("what a manifest says of split experts is checked") {
  const TemporaryDirectory directory;
  const auto path = test::write_small_bundle(directory.path(), split_model());
  std::ifstream in(path / "manifest.json", std::ios::binary);
  const std::string text((std::istreambuf_iterator<char>(in)), {});
  const std::string original = text.substr(text.find('\n') + 1);
  const auto base = Bundle::open(path, DirectIo::off).manifest().experts[0].experts[0].base_bytes;
  const auto refused = [&](const std::string& from, const std::string& to, const std::string& message) {
    std::string body = original;
    body.replace(body.find(from), from.size(), to);
    const std::string digest = digest_text(xxh64(std::as_bytes(std::span(body))));
    std::ofstream(path / "manifest.json", std::ios::binary) << "{\"checksum\":\"" << digest << "\",\n"
                                                            << body;
    CHECK(test::contains(test::error_of(ErrorKind::corrupt, [&] { Model(make_runtime(1 << 30), path, {}); }),
                         message));
  };
  refused(R"([["int4","int4","int4"]])", R"([["int4","int3","int4"]])",
          "layer 0: expert 0 is split, which its formats cannot be");
  const std::string stated = "0," + std::to_string(base) + ",";
  refused(stated, "0,64,", "layer 0: expert 0 has a base of 64 bytes, its shape and formats need");
  refused(stated, "0,0,", "extents[0][5]");
  refused(stated, "0,99999999,", "extents[0][5]");
  refused(stated, "0," + std::to_string(base) + ",7,", "refinement_checksum");
}
