#include "engine/runtime.h"

#include <unistd.h>

#include <algorithm>

#include "control/knobs.h"
#include "platform/cpu.h"
#include "platform/error.h"

namespace edgert {
namespace {

constexpr std::uint64_t kMiB = 1 << 20;

// What is left to the rest of the machine when the budget is `auto`.
std::uint64_t automatic_budget() {
  const std::uint64_t available = available_memory_bytes();
  if (available == 0) {
    throw Error(ErrorKind::budget,
                "memory: the available memory cannot be read on this system; state a budget, such as 2GiB");
  }
  const std::uint64_t margin = std::clamp<std::uint64_t>(available / 8, 64 * kMiB, 1024 * kMiB);
  return available > 2 * margin ? available - margin : available / 2;
}

}  // namespace

Runtime::Runtime(const RuntimeOptions& options)
    : kernels_(options.isa.empty() ? kernels() : kernels(options.isa)),
      budget_(
          std::make_shared<Budget>(options.memory_bytes != 0 ? options.memory_bytes : automatic_budget())),
      direct_io_(options.direct_io),
      io_threads_(options.io_threads),
      io_depth_(options.io_threads),
      process_(getpid()) {
  check_knob("threads", options.threads);
  check_knob("io_threads", options.io_threads);
  pool_ = std::make_unique<ThreadPool>(options.threads != 0 ? options.threads : usable_cores());
  reader_ = make_reader(options.io_backend, options.io_threads);
}

void Runtime::set_io_depth(int reads) {
  if (reads < 1 || reads > io_threads_) {
    throw Error(ErrorKind::invalid_argument, "io_threads: found " + std::to_string(reads) +
                                                 ", allowed 1 to " + std::to_string(io_threads_) +
                                                 ", with which it was loaded");
  }
  reader_->set_depth(reads);
  io_depth_ = reads;
}

Runtime::~Runtime() {
  if (getpid() == process_) return;
  // The threads stayed behind when this process was forked: to wait for them would take forever.
  static_cast<void>(pool_.release());
  static_cast<void>(reader_.release());
}

}  // namespace edgert
