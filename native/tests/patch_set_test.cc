// Patches that a product takes over on the way are those that would have been put on before it.
#include <doctest/doctest.h>

#include "adapters/compiled_patches.h"
#include "kernels_support.h"
#include "model/linear.h"
#include "quant/pack.h"

using namespace edgert;

namespace {

// So wide that few tiles are patched together, the last of them not full.
constexpr std::size_t kRows = 103, kCols = 8192;

std::shared_ptr<const Adapter> sparse(const std::shared_ptr<const Targets>& targets,
                                      const std::shared_ptr<Budget>& budget, unsigned first) {
  std::vector<std::int32_t> rows, cols;
  std::vector<float> values;
  std::vector<std::int8_t> remainders;
  for (unsigned place = first; place < kRows * kCols; place += 331) {
    rows.push_back(static_cast<std::int32_t>(place / kCols));
    cols.push_back(static_cast<std::int32_t>(place % kCols));
    values.push_back(static_cast<float>(place % 17) * 0.01F - 0.08F);
    remainders.push_back(static_cast<std::int8_t>(static_cast<int>(place % 201) - 100));
  }
  AdapterSource source;
  source.target = "output";
  source.rows = rows;
  source.cols = cols;
  source.values = values;
  source.remainders = remainders;
  return std::make_shared<const Adapter>(targets, std::span(&source, 1), budget, "sparse");
}

}  // namespace

TEST_CASE("patches that a product takes over change what patches before it do") {
  Random random(12);
  Targets some;
  some.add("output", {kRows, kCols});
  const auto targets = std::make_shared<const Targets>(std::move(some));
  const auto budget = std::make_shared<Budget>(1 << 28);
  const std::vector<float> weights = random_vector(kRows * kCols, -1, 1, random),
                           x = random_vector(3 * kCols, -1, 1, random);
  for (const char* name : {"int8", "int3"}) {
    const Format& as = format(name);
    std::vector<std::byte> bundle(packed_bytes(as, kRows, kCols));
    pack_matrix(as, SourceType::f32, std::as_bytes(std::span(weights)), kRows, kCols, bundle, {}, 1);
    const auto set_of = [&](unsigned first) -> std::shared_ptr<PatchSet> {
      const AdapterMix mix{{{sparse(targets, budget, first), 1}}};
      return std::make_shared<CompiledPatches>(*targets, [&](int) { return as.id; }, mix, budget);
    };
    for (const int threads : {1, 3}) {
      CAPTURE(name);
      CAPTURE(threads);
      ThreadPool pool(threads);
      const Machine machine{pool, kernels()};
      const auto one = set_of(5), two = set_of(7);
      std::vector<std::byte> codes = bundle, before = bundle;
      const auto times_x = [&](std::vector<std::byte>& of, Repatch* repatch) {
        std::vector<float> y(3 * kRows);
        std::vector<std::int8_t> quantized(3 * kCols);
        std::vector<float> scales(3 * kCols / kActivationGroup);
        std::vector<GroupSum> sums(scales.size());
        Activations in{x.data(), kCols, 3, {quantized.data(), scales.data(), sums.data(), kCols}};
        quantize(machine, in, kCols);
        Product work = product({as.id, kRows, kCols, of.data(), 0}, in, y.data(), kRows);
        work.repatch = repatch;
        multiply(machine, {work});
        return y;
      };
      const auto plain = times_x(codes, nullptr);
      PatchSet* on = nullptr;  // what `codes` carries
      for (PatchSet* next : {one.get(), two.get(), static_cast<PatchSet*>(nullptr), two.get(), one.get()}) {
        Repatch taken{on, next, 0, codes.data()}, put_on{on, next, 0, before.data()};
        const auto y = times_x(codes, &taken);
        CHECK(taken.done);
        put_on.tiles(0, put_on.tiles());
        CHECK(codes == before);
        CHECK(same_bits(y, times_x(before, nullptr)));
        CHECK(same_bits(y, plain) == (next == nullptr));
        on = next;
      }
    }
  }
}
