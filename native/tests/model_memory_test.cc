#include "engine/model.h"
#include "model_support.h"
#include "small_bundle.h"
#include "support.h"

using namespace edgert;
using test::all_logits;
using test::contains;
using test::error_of;
using test::make_runtime;
using test::minimum;
using test::SmallModel;
using test::some_tokens;
using test::TemporaryDirectory;

TEST_CASE("the budget is the bound of everything, and the least that works is named") {
  const TemporaryDirectory directory;
  const auto path = test::write_small_bundle(directory.path(), {});
  const std::uint64_t least = minimum(path, {});
  const std::string message = error_of(ErrorKind::budget, [&] { Model(make_runtime(least - 1), path, {}); });
  CHECK(contains(message, std::to_string(least)));
  const auto runtime = make_runtime(least);
  Model model(runtime, path, {});
  all_logits(model, some_tokens(60, 67));
  CHECK(runtime->budget()->peak_bytes() <= least);
}

TEST_CASE("from the budget named on, every expert stays in memory") {
  const TemporaryDirectory directory;
  SmallModel small;
  small.hidden = 256;
  small.intermediate = 256;
  const auto path = test::write_small_bundle(directory.path(), small);
  const std::uint64_t enough = Model(make_runtime(), path, {}).plan().resident_bytes;
  CHECK(Model(make_runtime(enough), path, {}).plan().resident());
  CHECK(Model(make_runtime(enough + enough / 4), path, {}).plan().resident());
  CHECK_FALSE(Model(make_runtime(enough - 1), path, {}).plan().resident());
}

TEST_CASE("sizes that no memory holds are refused, not wrapped around") {
  const TemporaryDirectory directory;
  SmallModel small;
  small.context = 1 << 30;
  const auto path = test::write_small_bundle(directory.path(), small);
  const std::string message =
      error_of(ErrorKind::budget, [&] { Model(make_runtime(), path, {1 << 30, 1024, 0, {}}); });
  CHECK(contains(message, "KV cache"));
  Recipe recipe;
  recipe.blocks.emplace_back();
  AttentionRecipe attention;
  attention.num_kv_heads = 1 << 12;
  attention.head_dim = 512;
  recipe.blocks[0].mixer = attention;
  recipe.layers.assign(1 << 16, 0);
  const KvPool::Shape shape{std::int64_t{1} << 30, 1 << 12};
  CHECK(KvPool::kv_bytes(KvLayout(recipe, KvType::f32), shape) == kUnaddressable);
  GatedDeltaRecipe delta;
  delta.num_key_heads = delta.num_value_heads = 1 << 12;
  delta.key_head_dim = delta.value_head_dim = 512;
  delta.conv_kernel = 4;
  recipe.blocks[0].mixer = delta;
  CHECK(KvPool::state_bytes(StateLayout(recipe), shape) == kUnaddressable);
}

TEST_CASE("a load can be stopped, and leaves nothing behind") {
  const TemporaryDirectory directory;
  const auto path = test::write_small_bundle(directory.path(), {});
  const auto runtime = make_runtime();
  CHECK_THROWS_AS(Model(runtime, path, {}, [] { throw std::runtime_error("stop"); }), std::runtime_error);
  CHECK(runtime->budget()->used_bytes() == 0);
}

TEST_CASE("a full KV cache is an error of the request that found it full") {
  const TemporaryDirectory directory;
  Model model(make_runtime(), test::write_small_bundle(directory.path(), {}), {});
  const auto first = model.sequence();
  const auto second = model.sequence();
  const auto run = [&](KvSequence& sequence, int count) {
    const auto tokens = some_tokens(count, 67);
    const StepRow row{&sequence, tokens, Wanted::none};
    model.step(std::span(&row, 1), [](std::size_t, std::size_t, std::span<float>) {}, {});
  };
  run(*first, 80);
  CHECK(contains(error_of(ErrorKind::budget, [&] { run(*second, 20); }), "KV cache is full"));
  run(*first, 16);
  first->rewind(0);
  run(*second, 90);
}
