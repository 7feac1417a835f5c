#include "engine/probe.h"

#include <doctest/doctest.h>

#include <filesystem>
#include <string>

#include "support.h"

using namespace edgert;
using namespace edgert::test;

namespace {

constexpr std::size_t kMiB = 1 << 20;

ReadPattern pattern(std::size_t block, int depth) {
  ReadPattern p;
  p.span_bytes = kMiB;
  p.block_bytes = block;
  p.depth = depth;
  p.direct = false;
  p.seconds = 0.001;
  return p;
}

}  // namespace

TEST_CASE("every kernel table does the multiply-adds that it reports") {
  for (const auto name : runnable_kernels()) {
    const KernelTable& table = kernels(name);
    CHECK(table.dot_rounds(0) == 0);
    CHECK(table.dot_rounds(1) > 0);
    CHECK(table.dot_rounds(10) == 10 * table.dot_rounds(1));
  }
}

TEST_CASE("memory and arithmetic have a rate on any number of threads") {
  for (const int threads : {1, 2}) {
    ThreadPool pool(threads);
    CHECK(measure_memory(pool, kMiB) > 0);
    CHECK(measure_arithmetic(pool, kernels("scalar")) > 0);
  }
  CHECK(memory_probe_bytes() >= 64 * kMiB);
}

TEST_CASE("reads are measured of a file that has been removed") {
  TemporaryDirectory directory;
  const auto path = directory.write("data.bin", std::string(kMiB, 'x'));
  ReadProbe probe(path);
  std::filesystem::remove(path);
  for (const bool random : {true, false}) {
    for (const bool direct : {false, true}) {
      if (direct && !probe.takes_direct()) continue;
      for (const int depth : {1, 16}) {
        ReadPattern p = pattern(64 * 1024, depth);
        p.random = random;
        p.direct = direct;
        CHECK(probe.measure(p) > 0);
      }
    }
  }
}

TEST_CASE("a read that fails ends the measurement with its error") {
  TemporaryDirectory directory;
  const auto path = directory.write("data.bin", std::string(kMiB / 2, 'x'));
  ReadProbe probe(path);
  ReadPattern past_the_end = pattern(kMiB, 4);
  CHECK(contains(error_of(ErrorKind::corrupt, [&] { probe.measure(past_the_end); }), "the file ends here"));
}

TEST_CASE("a pattern that no file can serve is refused") {
  TemporaryDirectory directory;
  ReadProbe probe(directory.write("data.bin", std::string(kMiB, 'x')));
  const auto refused = [&](ReadPattern p) {
    return error_of(ErrorKind::invalid_argument, [&] { probe.measure(p); });
  };
  CHECK(contains(refused(pattern(0, 1)), "block_bytes"));
  CHECK(contains(refused(pattern(1000, 1)), "multiple of 4096"));
  CHECK(contains(refused(pattern(2 * kMiB, 1)), "span_bytes"));
  CHECK(contains(refused(pattern(4096, 0)), "1 to 256"));
  ReadPattern endless = pattern(4096, 1);
  endless.seconds = 1e9;
  CHECK(contains(refused(endless), "seconds"));
  error_of(ErrorKind::not_found, [&] { ReadProbe(directory.path() / "absent.bin"); });
}
