// What the processor can do, asked once.
#pragma once

#include <string>
#include <vector>

namespace edgert {

struct CpuFeatures {
  bool avx2 = false;         // AVX2, FMA and F16C
  bool avx512_vnni = false;  // AVX-512 F/BW/DQ/VL and VNNI
  bool neon_dot = false;     // AArch64 with the dot-product extension
  bool neon_i8mm = false;    // AArch64 with int8 matrix multiplication
};

const CpuFeatures& cpu_features() noexcept;
// Processors that this process may run on (affinity and cgroup quota respected), at least 1.
int usable_cores() noexcept;
std::string cpu_name();

}  // namespace edgert
