#include "engine/probe.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "platform/error.h"
#include "platform/memory.h"

namespace edgert {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kMiB = 1 << 20;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The largest work / time of so many passes.
template <typename Pass>
double best_rate(int passes, Pass&& pass) {
  double best = 0;
  for (int i = 0; i < passes; ++i) {
    const auto start = Clock::now();
    const double work = pass();
    best = std::max(best, work / seconds_since(start));
  }
  return best;
}

// Touches every byte; the lines are asked for well before they are needed.
void stream(const std::byte* data, std::size_t bytes) {
  typedef std::uint64_t Vector __attribute__((vector_size(16)));
  constexpr std::size_t kLine = 64, kLines = 4, kAhead = 4096;
  Vector sums[kLines] = {};
  for (std::size_t i = 0; i + kLines * kLine <= bytes; i += kLines * kLine) {
    for (std::size_t j = 0; j < kLines; ++j) {
      const std::byte* const at = data + i + j * kLine;
      __builtin_prefetch(at + kAhead);
      Vector line[kLine / sizeof(Vector)];
      __builtin_memcpy(line, at, kLine);
      sums[j] ^= (line[0] ^ line[1]) ^ (line[2] ^ line[3]);
    }
  }
  asm volatile("" : : "m"(sums));
}

// `depth` reads in flight until the time is over.
class ReadRun {
 public:
  ReadRun(std::shared_ptr<const File> file, const ReadPattern& pattern, std::uint64_t seed)
      : file_(std::move(file)),
        pattern_(pattern),
        block_(round_up(pattern.block_bytes, File::kDirectAlignment)),
        memory_(nullptr, block_ * static_cast<std::size_t>(pattern.depth), "probe"),
        blocks_(pattern.span_bytes / pattern.block_bytes),
        reader_(make_reader(pattern.backend, pattern.depth)) {
    // As memory is that has been in use: the first touch of a page is not what is measured.
    std::fill_n(memory_.as<std::uint64_t>(), memory_.size() / sizeof(std::uint64_t), 1);
    std::iota(blocks_.begin(), blocks_.end(), 0);
    if (pattern.random) std::shuffle(blocks_.begin(), blocks_.end(), std::mt19937_64(seed));
  }

  double rate() {
    start_ = Clock::now();
    for (int i = 0; i < pattern_.depth; ++i) submit(static_cast<std::size_t>(i));
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return finished_ == pattern_.depth; });
    if (failure_) std::rethrow_exception(failure_);
    return static_cast<double>(blocks_read_ * pattern_.block_bytes) / seconds_since(start_);
  }

 private:
  std::uint64_t next_offset() { return blocks_[next_++ % blocks_.size()] * pattern_.block_bytes; }

  void submit(std::size_t slot) {
    const auto destination = memory_.span().subspan(slot * block_, pattern_.block_bytes);
    reader_->submit({file_, next_offset(), destination, ReadPriority::demand,
                     [this, slot](std::exception_ptr failure) { completed(slot, failure); }});
  }

  void completed(std::size_t slot, const std::exception_ptr& failure) noexcept {
    bool again = !failure && seconds_since(start_) < pattern_.seconds;
    if (!failure) ++blocks_read_;
    std::exception_ptr mine = failure;
    if (again) {
      try {
        return submit(slot);
      } catch (...) {
        mine = std::current_exception();
      }
    }
    const std::lock_guard lock(mutex_);
    if (mine) failure_ = mine;
    ++finished_;
    changed_.notify_one();
  }

  const std::shared_ptr<const File> file_;
  const ReadPattern pattern_;
  const std::size_t block_;
  Buffer memory_;
  std::vector<std::uint64_t>
      blocks_;  // in the order in which they are read: each once before any is read again
  Clock::time_point start_;
  std::atomic<std::uint64_t> next_{0};
  std::atomic<std::uint64_t> blocks_read_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
  int finished_ = 0;  // of the reads in flight
  std::exception_ptr failure_;
  std::unique_ptr<Reader> reader_;  // last: its threads use the rest
};

}  // namespace

std::size_t memory_probe_bytes() {
  constexpr std::size_t kLeast = 64 * kMiB, kUsual = 512 * kMiB, kTimesCache = 16;
  std::size_t wanted = kUsual;
#ifdef _SC_LEVEL3_CACHE_SIZE
  if (const long cache = sysconf(_SC_LEVEL3_CACHE_SIZE); cache > 0) {
    wanted = std::max(wanted, kTimesCache * static_cast<std::size_t>(cache));
  }
#endif
  const std::uint64_t available = available_memory_bytes();
  if (available == 0) return kLeast;
  return std::max(kLeast, static_cast<std::size_t>(std::min<std::uint64_t>(wanted, available / 4)));
}

double measure_memory(ThreadPool& pool, std::size_t bytes) {
  constexpr std::size_t kPiece = 2 * kMiB;
  const std::size_t pieces = (bytes + kPiece - 1) / kPiece;
  const Buffer memory(nullptr, pieces * kPiece, "probe");
  madvise(memory.data(), memory.size(), MADV_HUGEPAGE);  // a wish: translation is not what is measured
  constexpr int kPasses = 20;
  std::fill_n(memory.as<std::uint64_t>(), memory.size() / sizeof(std::uint64_t), 1);
  return best_rate(kPasses, [&] {
    pool.run(static_cast<int>(pieces), 1, [&](int begin, int, int) {
      stream(memory.data() + static_cast<std::size_t>(begin) * kPiece, kPiece);
    });
    return static_cast<double>(memory.size());
  });
}

double measure_arithmetic(ThreadPool& pool, const KernelTable& kernels) {
  constexpr double kPieceSeconds = 100e-6;
  constexpr int kPieces = 20;  // of a thread; short passes find the moments when no other program runs
  constexpr int kPasses = 100;
  std::uint64_t rounds = 1;  // of a piece, found by trying
  for (;; rounds *= 2) {
    const auto start = Clock::now();
    kernels.dot_rounds(rounds);
    if (seconds_since(start) >= kPieceSeconds) break;
  }
  return best_rate(kPasses, [&] {
    std::atomic<std::uint64_t> done{0};
    pool.run(kPieces * pool.threads(), 1, [&](int, int, int) { done += kernels.dot_rounds(rounds); });
    return 2 * static_cast<double>(done.load());
  });
}

ReadProbe::ReadProbe(const std::filesystem::path& path) : buffered_(File::open(path, DirectIo::off)) {
  auto file = File::open(path, DirectIo::automatic);
  if (file->direct()) direct_ = std::move(file);
}

double ReadProbe::measure(const ReadPattern& pattern) {
  const auto refuse = [](const std::string& message) {
    throw Error(ErrorKind::invalid_argument, "probe: " + message);
  };
  if (pattern.block_bytes == 0 || pattern.block_bytes % File::kDirectAlignment != 0) {
    refuse("block_bytes: found " + std::to_string(pattern.block_bytes) + ", allowed is a multiple of " +
           std::to_string(File::kDirectAlignment));
  }
  if (pattern.span_bytes < pattern.block_bytes) {
    refuse("span_bytes: found " + std::to_string(pattern.span_bytes) + ", allowed is a block or more");
  }
  if (!(pattern.seconds >= 0 && pattern.seconds <= 60)) refuse("seconds: allowed is 0 to 60");
  if (pattern.direct && !direct_) refuse("direct: the file system takes no direct reads");
  return ReadRun(pattern.direct ? direct_ : buffered_, pattern, ++runs_).rate();
}

}  // namespace edgert
