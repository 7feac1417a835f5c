// Patches that are made of what adapters in memory add, of a matrix' codes as the bundle has them, the first
// time that it is wanted, and kept. Not covered are matrices whose codes are no evenly spaced numbers, and
// those of which remainders are missing.
#pragma once

#include "adapters/patch_set.h"

namespace edgert {

class CompiledPatches final : public PatchSet {
 public:
  // REQUIRES adapters of these targets, each once. Error{budget} where the memory is not there.
  CompiledPatches(const Targets& targets, const FormatOf& format_of, const AdapterMix& mix,
                  std::shared_ptr<Budget> budget);

 private:
  void make(const Matrix& matrix, int target, std::size_t tile, std::byte* of_tile) noexcept override;
};

}  // namespace edgert
