// The choice of a table: once a process, by what the processor can run or by EDGERT_ISA.
#include <cstdlib>
#include <string>
#include <vector>

#include "kernels/tables.h"
#include "platform/cpu.h"
#include "platform/error.h"

namespace edgert {
namespace {

// Scalar first, best last.
const std::vector<const KernelTable*>& runnable_tables() {
  static const std::vector<const KernelTable*> tables = [] {
    std::vector<const KernelTable*> found = {&scalar_table, &portable_table};
#if defined(__x86_64__)
    if (cpu_features().avx2) found.push_back(&avx2_table);
    if (cpu_features().avx_vnni) found.push_back(&avxvnni_table);
    if (cpu_features().avx512_vnni) found.push_back(&avx512_table);
#elif defined(__aarch64__)
    if (cpu_features().neon_dot) found.push_back(&neon_table);
    if (cpu_features().neon_i8mm) found.push_back(&neon_i8mm_table);
#endif
    return found;
  }();
  return tables;
}

}  // namespace

std::span<const std::string_view> runnable_kernels() {
  static const std::vector<std::string_view> names = [] {
    std::vector<std::string_view> found;
    for (const KernelTable* table : runnable_tables()) found.push_back(table->name);
    return found;
  }();
  return names;
}

const KernelTable& kernels(std::string_view name) {
  std::string runnable;
  for (const KernelTable* table : runnable_tables()) {
    if (table->name == name) return *table;
    runnable += std::string(runnable.empty() ? "" : ", ") + std::string(table->name);
  }
  throw Error(ErrorKind::unsupported, "instruction set '" + std::string(name) +
                                          "' is unknown or not one that this processor runs; it runs " +
                                          runnable + " (set EDGERT_ISA to one of them, or unset it)");
}

const KernelTable& kernels() {
  static const KernelTable& chosen = []() -> const KernelTable& {
    const char* name = std::getenv("EDGERT_ISA");
    return name && *name ? kernels(name) : *runnable_tables().back();
  }();
  return chosen;
}

}  // namespace edgert
