// What the processor can do, asked once.
#pragma once

#include <filesystem>
#include <string>

namespace edgert {

struct CpuFeatures {
  bool avx2 = false;         // AVX2, FMA and F16C
  bool avx_vnni = false;     // AVX2 and its own VNNI
  bool avx512_vnni = false;  // AVX-512 F/BW/DQ/VL and VNNI
  bool neon_dot = false;     // AArch64 with dot products and half-precision arithmetic
  bool neon_i8mm = false;    // AArch64 with int8 matrix multiplication
};

const CpuFeatures& cpu_features() noexcept;
// Processors that this process may run on (affinity and the whole cores of a cgroup quota respected), at
// least 1. `root` is where /proc and /sys are looked up (for tests).
int usable_cores(const std::filesystem::path& root = "/");
std::string cpu_name();

}  // namespace edgert
