// Measures what this machine can do at most: reading memory, int8 arithmetic, reading storage.
//
// Threads: every function runs its own threads and returns when they are done; two measurements at once spoil
// each other. Each takes a second or less unless asked for more, and checks nothing in between.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>

#include "kernels/kernels.h"
#include "platform/thread_pool.h"
#include "storage/reader.h"

namespace edgert {

// Memory that measure_memory reads: far more than the caches hold, at most a quarter of what is available.
std::size_t memory_probe_bytes();

// Bytes a second of a streaming read of `bytes` of memory by every thread of the pool: the best of several
// passes. REQUIRES bytes > 0.
double measure_memory(ThreadPool& pool, std::size_t bytes);

// int8 operations a second (a multiply-add is two) of the table's dot product: the best of several passes.
double measure_arithmetic(ThreadPool& pool, const KernelTable& kernels);

struct ReadPattern {
  std::uint64_t span_bytes = 0;  // reads lie in [0, span_bytes) of the file
  std::size_t block_bytes = 0;   // of a read, at multiples of itself
  int depth = 1;                 // reads in flight
  bool random = true;            // else one block after the other
  bool direct = true;            // past the page cache
  IoBackend backend = IoBackend::pread;
  double seconds = 0.3;
};

// A file to measure reads of, through the readers that models use.
class ReadProbe {
 public:
  // Opens `path`, also for direct reads where its file system takes them. The file may be removed afterwards.
  explicit ReadProbe(const std::filesystem::path& path);
  bool takes_direct() const noexcept { return direct_ != nullptr; }

  // Bytes a second; random reads in another order each time. Error{invalid_argument} for a pattern that the
  // file cannot serve.
  double measure(const ReadPattern& pattern);

 private:
  std::shared_ptr<const File> buffered_;
  std::shared_ptr<const File> direct_;  // null where the file system takes no direct reads
  std::uint64_t runs_ = 0;
};

}  // namespace edgert
