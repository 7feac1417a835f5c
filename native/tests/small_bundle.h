// A small random model written as a bundle, from the format's definition, for the tests above the bundle
// room.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace edgert::test {

struct SmallModel {
  int hidden = 48;
  int vocab = 67;
  int layers = 3;
  int experts = 6;
  int per_token = 2;
  int intermediate = 40;
  int context = 96;
  std::vector<std::string> expert_formats{"int4"};  // expert e has format e modulo size
  std::string dense_format = "int8";
  bool split_experts = false;  // all of them
};

// Writes the bundle and returns its directory. The same model gives the same weights.
std::filesystem::path write_small_bundle(const std::filesystem::path& parent, const SmallModel& model);

}  // namespace edgert::test
