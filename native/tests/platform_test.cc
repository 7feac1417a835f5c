#include <signal.h>

#include <atomic>
#include <cstring>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

#include "platform/cgroup.h"
#include "platform/cpu.h"
#include "platform/memory.h"
#include "platform/thread.h"
#include "platform/thread_pool.h"
#include "support.h"

using namespace edgert;
using edgert::test::contains;
using edgert::test::error_of;
using edgert::test::TemporaryDirectory;

TEST_CASE("a budget counts what is charged and refuses the rest, naming the numbers") {
  Budget budget(1000);
  budget.charge(600, "dense weights");
  CHECK(budget.used_bytes() == 600);
  CHECK(budget.available_bytes() == 400);
  CHECK_FALSE(budget.try_charge(401));
  const auto message = error_of(ErrorKind::budget, [&] { budget.charge(401, "the KV cache"); });
  for (const auto* part : {"the KV cache", "401", "600", "1000"}) CHECK(contains(message, part));
  CHECK(budget.try_charge(400));
  budget.release(1000);
  CHECK(budget.used_bytes() == 0);
  CHECK(budget.peak_bytes() == 1000);
  CHECK_FALSE(budget.try_charge(~std::uint64_t{0}));
}

TEST_CASE("a charge is given back when it dies") {
  const auto budget = std::make_shared<Budget>(1000);
  {
    const Charge charge(budget, 900, "expert slots");
    CHECK(budget->used_bytes() == 900);
    CHECK(
        contains(error_of(ErrorKind::budget, [&] { Charge(budget, 101, "expert slots"); }), "expert slots"));
  }
  CHECK(budget->used_bytes() == 0);
}

TEST_CASE("memory that is held already counts past the limit, and leaves nothing to others") {
  Budget budget(1000);
  budget.hold(1500);
  CHECK(budget.used_bytes() == 1500);
  CHECK(budget.peak_bytes() == 1500);
  CHECK(budget.available_bytes() == 0);
  CHECK_FALSE(budget.try_charge(1));
  budget.release(1500);
  CHECK(budget.try_charge(1000));
}

TEST_CASE("a budget holds under many threads") {
  Budget budget(8);
  std::atomic<int> over{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 2000; ++i) {
        if (!budget.try_charge(3)) continue;
        if (budget.used_bytes() > 8) ++over;
        budget.release(3);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(over == 0);
  CHECK(budget.used_bytes() == 0);
  CHECK(budget.peak_bytes() <= 8);
}

TEST_CASE("a buffer is zeroed, page aligned, charged by the page, and gives all back") {
  auto budget = std::make_shared<Budget>(4 * page_size());
  {
    Buffer buffer(budget, page_size() + 1, "scratch");
    CHECK(reinterpret_cast<std::uintptr_t>(buffer.data()) % page_size() == 0);
    CHECK(buffer.size() == page_size() + 1);
    CHECK(buffer.charged_bytes() == 2 * page_size());
    CHECK(buffer.span().back() == std::byte{0});
    std::memset(buffer.data(), 1, buffer.size());

    Buffer moved(std::move(buffer));
    CHECK_FALSE(buffer);
    CHECK(budget->used_bytes() == 2 * page_size());
    moved = Buffer(budget, 1, "smaller");
    CHECK(budget->used_bytes() == page_size());
    CHECK(contains(error_of(ErrorKind::budget, [&] { Buffer(budget, 4 * page_size(), "too much"); }),
                   "too much"));
    error_of(ErrorKind::budget, [&] { Buffer(budget, ~std::size_t{0}, "everything"); });
  }
  CHECK(budget->used_bytes() == 0);
  CHECK_FALSE(Buffer(budget, 0, "nothing"));
}

TEST_CASE("a buffer that the system refuses is an error and charges nothing") {
  auto budget = std::make_shared<Budget>(~std::uint64_t{0});
  error_of(ErrorKind::budget, [&] { Buffer(budget, std::size_t{1} << 60, "an exbibyte"); });
  CHECK(budget->used_bytes() == 0);
}

TEST_CASE("available memory is the least of MemAvailable and every cgroup above the process") {
  TemporaryDirectory root;
  root.write("proc/meminfo", "MemTotal:  8000 kB\nMemAvailable:    4000 kB\n");
  SUBCASE("nothing can be read") {
    std::filesystem::remove_all(root.path() / "proc");
    CHECK(available_memory_bytes(root.path()) == 0);
  }
  SUBCASE("no cgroup") { CHECK(available_memory_bytes(root.path()) == 4000 * 1024); }
  SUBCASE("v2: the limit of an ancestor, with droppable page cache not counted as used") {
    root.write("proc/self/cgroup", "0::/slice/service\n");
    root.write("proc/self/mountinfo",
               "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n");
    root.write("sys/fs/cgroup/slice/memory.max", "1000000\n");
    root.write("sys/fs/cgroup/slice/memory.current", "700000\n");
    root.write("sys/fs/cgroup/slice/memory.stat", "anon 1\ninactive_file 200000\n");
    root.write("sys/fs/cgroup/slice/service/memory.max", "max\n");
    CHECK(available_memory_bytes(root.path()) == 500000);
    root.write("sys/fs/cgroup/slice/service/memory.high", "300000\n");
    CHECK(available_memory_bytes(root.path()) == 300000);
    root.write("sys/fs/cgroup/slice/service/memory.current", "300001\n");
    CHECK(available_memory_bytes(root.path()) == 0);
  }
  SUBCASE("v1: beside other controllers, mounted from within a container") {
    root.write("proc/self/cgroup", "5:cpu,cpuacct:/docker/x\n4:memory:/docker/x/inner\n0::/\n");
    root.write("proc/self/mountinfo",
               "31 23 0:27 /docker/x /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
               "32 23 0:28 /docker/x /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n");
    root.write("sys/fs/cgroup/memory/memory.limit_in_bytes", "2000000\n");
    root.write("sys/fs/cgroup/memory/memory.usage_in_bytes", "1500000\n");
    root.write("sys/fs/cgroup/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 500000\n");
    root.write("sys/fs/cgroup/memory/inner/memory.limit_in_bytes", "9223372036854771712\n");
    CHECK(available_memory_bytes(root.path()) == 1000000);
  }
  SUBCASE("a path that lies outside what is mounted leaves the top") {
    root.write("proc/self/cgroup", "0::/../elsewhere\n");
    root.write("proc/self/mountinfo", "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
    root.write("sys/fs/cgroup/memory.max", "1000\n");
    CHECK(available_memory_bytes(root.path()) == 1000);
  }
}

TEST_CASE("this machine reports memory, cores and a name") {
  CHECK(available_memory_bytes() > 0);
  CHECK(anonymous_resident_bytes() > 0);
  CHECK(usable_cores() >= 1);
  CHECK_FALSE(cpu_name().empty());
  if (cpu_features().avx512_vnni) CHECK(cpu_features().avx2);
}

TEST_CASE("a CPU quota leaves its whole cores, at least one") {
  TemporaryDirectory root;
  root.write("proc/self/cgroup", "0::/box\n");
  root.write("proc/self/mountinfo", "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
  root.write("sys/fs/cgroup/box/cpu.max", "150000 100000\n");
  CHECK(usable_cores(root.path()) == 1);
  root.write("sys/fs/cgroup/box/cpu.max", "50000 100000\n");
  CHECK(usable_cores(root.path()) == 1);
  root.write("sys/fs/cgroup/box/cpu.max", "max 100000\n");
  CHECK(usable_cores(root.path()) == usable_cores());
}

TEST_CASE("a thread of the library takes no signals; the thread that starts it keeps its own") {
  sigset_t inside, before, after;
  pthread_sigmask(SIG_SETMASK, nullptr, &before);
  start_thread("edgert-test", [&] { pthread_sigmask(SIG_SETMASK, nullptr, &inside); }).join();
  pthread_sigmask(SIG_SETMASK, nullptr, &after);
  CHECK(sigismember(&inside, SIGINT) == 1);
  CHECK(sigismember(&after, SIGINT) == sigismember(&before, SIGINT));
}

TEST_CASE("a pool runs every index once, whatever the threads and the grain") {
  for (const int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    CHECK(pool.threads() == threads);
    for (const int grain : {0, 1, 7, 1000}) {
      for (const int count : {0, 1, 5, 64, 1001}) {
        std::vector<std::atomic<int>> taken(static_cast<std::size_t>(count));
        std::atomic<bool> bounds{true};
        pool.run(count, grain, [&](int begin, int end, int worker) {
          if (begin >= end || worker < 0 || worker >= threads || (grain > 0 && end - begin > grain))
            bounds = false;
          for (int i = begin; i < end; ++i) ++taken[static_cast<std::size_t>(i)];
        });
        CHECK(bounds);
        for (const auto& times : taken) CHECK(times == 1);
      }
    }
  }
}

TEST_CASE("no two pieces run as the same worker at once") {
  ThreadPool pool(4);
  std::atomic<bool> busy[4] = {};
  std::atomic<bool> clash{false};
  for (int round = 0; round < 200; ++round) {
    pool.run(32, 1, [&](int, int, int worker) {
      if (busy[worker].exchange(true)) clash = true;
      busy[worker] = false;
    });
  }
  CHECK_FALSE(clash);
}

TEST_CASE("plain writes of a job are seen after it, and by the next job, back to back") {
  ThreadPool pool(3);
  std::vector<int> values(301, 0);
  for (int round = 0; round < 2000; ++round) {
    const int shift = round % 3;  // another worker is likely to take the index next time
    pool.run(300, 50, [&](int begin, int end, int) {
      for (int i = begin; i < end; ++i) ++values[static_cast<std::size_t>((i + shift) % 301)];
    });
  }
  long sum = 0;
  for (const int value : values) sum += value;
  CHECK(sum == 2000L * 300);
}

TEST_CASE("threads that share a pool take turns") {
  ThreadPool pool(3);
  const auto total = [&pool] {
    std::int64_t sum = 0;
    for (int job = 0; job < 300; ++job) {
      std::atomic<std::int64_t> part{0};
      pool.run(100, 1, [&](int begin, int end, int) {
        for (int i = begin; i < end; ++i) part += i;
      });
      sum += part;
    }
    return sum;
  };
  std::int64_t other = 0;
  std::thread thread([&] { other = total(); });
  CHECK(total() == 300 * 4950);
  thread.join();
  CHECK(other == 300 * 4950);
}

TEST_CASE("parked workers wake up for a job") {
  ThreadPool pool(2);
  for (int round = 0; round < 5; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    // Each piece waits for the other one, so that both threads are needed.
    std::atomic<int> arrived{0};
    pool.run(2, 1, [&](int, int, int) {
      ++arrived;
      while (arrived < 2) std::this_thread::yield();
    });
    CHECK(arrived == 2);
  }
}

TEST_CASE("what any worker throws, run() throws; the pool goes on working") {
  ThreadPool pool(3);
  for (int round = 0; round < 50; ++round) {
    CHECK_THROWS_WITH_AS(pool.run(30, 1,
                                  [&](int begin, int, int) {
                                    if (begin == round % 30) throw std::runtime_error("piece failed");
                                  }),
                         "piece failed", std::runtime_error);
    std::atomic<int> ran{0};
    pool.run(30, 1, [&](int, int, int) { ++ran; });
    CHECK(ran == 30);
  }
}

TEST_CASE("a pool has 1 to 1024 threads") {
  CHECK(contains(error_of(ErrorKind::invalid_argument, [] { ThreadPool pool(0); }), "1 to 1024"));
  error_of(ErrorKind::invalid_argument, [] { ThreadPool pool(1025); });
}
