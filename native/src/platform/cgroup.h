// The control groups that bound this process.
//
// Threads: functions without state. Every file is optional: what cannot be read does not bound.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace edgert {

struct CgroupDirectory {
  int version = 2;  // 1 or 2: the two name their files differently
  std::filesystem::path path;
};

// The directories of this process's cgroup and of its ancestors, as far as they are mounted, in which
// `controller` ("memory", "cpu") may be set. `root` stands for "/" (tests give it a tree of their own).
std::vector<CgroupDirectory> cgroup_directories(std::string_view controller,
                                                const std::filesystem::path& root);

// A file of one number; nothing where it cannot be read or is not a number (cgroup v2 writes "max").
std::optional<std::uint64_t> read_number(const std::filesystem::path& file);
// The number after `key` in a file of "key value" or "key: value" lines.
std::optional<std::uint64_t> read_field(const std::filesystem::path& file, std::string_view key);

}  // namespace edgert
