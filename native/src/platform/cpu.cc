#include "platform/cpu.h"

#include <sched.h>
#include <sys/utsname.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <limits>
#include <string_view>

#include "platform/cgroup.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#ifndef HWCAP2_I8MM  // headers before Linux 5.6
#define HWCAP2_I8MM (1 << 13)
#endif
#endif

namespace edgert {
namespace fs = std::filesystem;

namespace {

CpuFeatures detect() noexcept {
  CpuFeatures features;
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & (1u << 29)) != 0;
  features.avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  features.avx_vnni = features.avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1u << 4)) != 0;
  features.avx512_vnni = features.avx2 && __builtin_cpu_supports("avx512f") &&
                         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#elif defined(__aarch64__)
  const unsigned long capabilities = getauxval(AT_HWCAP);
  features.neon_dot = (capabilities & HWCAP_ASIMDDP) != 0 && (capabilities & HWCAP_ASIMDHP) != 0;
  features.neon_i8mm = features.neon_dot && (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0;
#endif
  return features;
}

// The value of the first "key : value" line of /proc/cpuinfo.
std::string cpuinfo(std::string_view key) {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with(key)) continue;
    const auto colon = line.find_first_not_of(" \t", key.size());
    if (colon == line.npos || line[colon] != ':') continue;
    const auto value = line.find_first_not_of(" \t", colon + 1);
    return value == line.npos ? "" : line.substr(value);
  }
  return "";
}

// Whole cores of a quota over a period: a pool that is throttled in mid-job is worse than one core fewer.
int quota_cores(const CgroupDirectory& cgroup) {
  std::int64_t quota = -1, period = 0;
  if (cgroup.version == 1) {
    std::ifstream(cgroup.path / "cpu.cfs_quota_us") >> quota;
    std::ifstream(cgroup.path / "cpu.cfs_period_us") >> period;
  } else {
    std::ifstream(cgroup.path / "cpu.max") >> quota >> period;  // "max 100000" leaves no number
  }
  if (quota <= 0 || period <= 0) return std::numeric_limits<int>::max();
  return static_cast<int>(std::clamp<std::int64_t>(quota / period, 1, std::numeric_limits<int>::max()));
}

}  // namespace

const CpuFeatures& cpu_features() noexcept {
  static const CpuFeatures features = detect();
  return features;
}

int usable_cores(const fs::path& root) {
  cpu_set_t allowed;
  int cores = 1;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) cores = std::max(1, CPU_COUNT(&allowed));
  for (const auto& cgroup : cgroup_directories("cpu", root)) cores = std::min(cores, quota_cores(cgroup));
  return cores;
}

std::string cpu_name() {
  for (const auto* key : {"model name", "Model", "Hardware"}) {
    if (auto name = cpuinfo(key); !name.empty()) return name;
  }
  std::string board;
  std::ifstream file("/proc/device-tree/model");
  if (std::getline(file, board, '\0') && !board.empty()) return board;
  utsname system;
  return uname(&system) == 0 ? system.machine : "unknown";
}

}  // namespace edgert
