#include "engine/runtime.h"

#include <algorithm>

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

int in_range(const char* name, int value, int minimum, int maximum) {
  if (value < minimum || value > maximum) {
    throw Error(ErrorKind::invalid_argument, std::string(name) + ": found " + std::to_string(value) +
                                                 ", allowed " + std::to_string(minimum) + " to " +
                                                 std::to_string(maximum));
  }
  return value;
}

}  // namespace

Runtime::Runtime(const RuntimeOptions& options)
    : kernels_(options.isa.empty() ? kernels() : kernels(options.isa)),
      budget_(
          std::make_shared<Budget>(options.memory_bytes != 0 ? options.memory_bytes : automatic_budget())),
      direct_io_(options.direct_io) {
  const int threads = in_range("threads", options.threads, 0, 1024);
  pool_ = std::make_unique<ThreadPool>(threads != 0 ? threads : usable_cores());
  reader_ = make_pread_reader(in_range("io_threads", options.io_threads, 1, 256));
}

}  // namespace edgert
