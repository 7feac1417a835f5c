// What a process has to run models with: the memory budget, the threads, the I/O, the kernels.
//
// Threads: construction and reserve() by one thread; the parts state their own rules.
// Ownership: models hold the runtime by shared_ptr; it outlives them.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "kernels/kernels.h"
#include "platform/memory.h"
#include "platform/thread_pool.h"
#include "storage/reader.h"

namespace edgert {

struct RuntimeOptions {
  std::uint64_t memory_bytes = 0;  // 0: available memory less a margin for the rest of the machine
  int threads = 0;                 // 0: the usable cores
  int io_threads = 4;              // reads in flight
  IoBackend io_backend = IoBackend::pread;
  DirectIo direct_io = DirectIo::automatic;
  std::string isa;  // empty: the best, or what EDGERT_ISA says
};

class Runtime {
 public:
  explicit Runtime(const RuntimeOptions& options);
  ~Runtime();

  // Counts memory that lives outside the native library, such as the tokenizer's, for the runtime's life.
  // Never refused: the model that then finds too little left names the budget that works, this included.
  void reserve(std::uint64_t bytes) { budget_->hold(bytes); }

  // From any thread, at any time; from 1 to what the runtime was made with.
  void set_active_threads(int threads) { pool_->set_active(threads); }
  void set_io_depth(int reads);
  int io_depth() const noexcept { return io_depth_; }

  const std::shared_ptr<Budget>& budget() const noexcept { return budget_; }
  ThreadPool& pool() noexcept { return *pool_; }
  Reader& reader() noexcept { return *reader_; }
  const KernelTable& kernel_table() const noexcept { return kernels_; }
  DirectIo direct_io() const noexcept { return direct_io_; }

 private:
  const KernelTable& kernels_;
  std::shared_ptr<Budget> budget_;
  std::unique_ptr<ThreadPool> pool_;
  std::unique_ptr<Reader> reader_;
  DirectIo direct_io_;
  const int io_threads_;
  std::atomic<int> io_depth_;
  const int process_;
};

}  // namespace edgert
