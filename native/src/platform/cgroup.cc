#include "platform/cgroup.h"

#include <charconv>
#include <fstream>
#include <sstream>

namespace edgert {
namespace fs = std::filesystem;

namespace {

std::optional<std::uint64_t> parse_number(std::string_view text) {
  const auto begin = text.find_first_not_of(" \t");
  if (begin == text.npos) return std::nullopt;
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data() + begin, text.data() + text.size(), value);
  return error == std::errc{} ? std::optional(value) : std::nullopt;
}

bool list_contains(std::string_view list, std::string_view item) {
  while (!list.empty()) {
    const auto comma = list.find(',');
    if (list.substr(0, comma) == item) return true;
    if (comma == list.npos) break;
    list.remove_prefix(comma + 1);
  }
  return false;
}

// Where a cgroup hierarchy is mounted, and which of its directories the mount shows as its top.
struct Mount {
  int version;
  fs::path top;
  fs::path point;
};

// A line of /proc/self/mountinfo: id parent device TOP POINT options... - TYPE source OPTIONS
std::optional<Mount> parse_mount(const std::string& line, std::string_view controller) {
  std::istringstream fields(line);
  std::string id, parent, device, top, point, word, type, source, options;
  fields >> id >> parent >> device >> top >> point;
  while (fields >> word && word != "-") {
  }
  fields >> type >> source >> options;
  if (type == "cgroup2") return Mount{2, top, point};
  if (type == "cgroup" && list_contains(options, controller)) return Mount{1, top, point};
  return std::nullopt;
}

// This process's path in the hierarchy, from a line "id:controllers:path" of /proc/self/cgroup.
std::optional<fs::path> cgroup_path(int version, std::string_view controller, const fs::path& root) {
  std::ifstream file(root / "proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const auto first = line.find(':');
    const auto second = first == line.npos ? first : line.find(':', first + 1);
    if (second == line.npos) continue;
    const std::string_view controllers(line.data() + first + 1, second - first - 1);
    if (version == 2 ? controllers.empty() : list_contains(controllers, controller))
      return line.substr(second + 1);
  }
  return std::nullopt;
}

}  // namespace

std::vector<CgroupDirectory> cgroup_directories(std::string_view controller, const fs::path& root) {
  std::vector<CgroupDirectory> directories;
  std::ifstream mounts(root / "proc/self/mountinfo");
  for (std::string line; std::getline(mounts, line);) {
    const auto mount = parse_mount(line, controller);
    if (!mount) continue;
    const auto path = cgroup_path(mount->version, controller, root);
    if (!path) continue;
    // Inside a container the path can lie above or beside what is mounted; then only the top is seen.
    fs::path below = path->lexically_relative(mount->top);
    if (below.empty() || *below.begin() == "..") below = ".";
    fs::path directory = root / mount->point.relative_path();
    directories.push_back({mount->version, directory});
    for (const auto& part : below) {
      if (part == "." || part.empty()) continue;
      directory /= part;
      directories.push_back({mount->version, directory});
    }
  }
  return directories;
}

std::optional<std::uint64_t> read_number(const fs::path& file) {
  std::ifstream stream(file);
  std::string line;
  return std::getline(stream, line) ? parse_number(line) : std::nullopt;
}

std::optional<std::uint64_t> read_field(const fs::path& file, std::string_view key) {
  std::ifstream stream(file);
  for (std::string line; std::getline(stream, line);) {
    std::string_view rest(line);
    if (!rest.starts_with(key)) continue;
    rest.remove_prefix(key.size());
    if (rest.starts_with(':')) rest.remove_prefix(1);
    if (rest.starts_with(' ') || rest.starts_with('\t')) return parse_number(rest);
  }
  return std::nullopt;
}

}  // namespace edgert
