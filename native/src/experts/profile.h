// The routing profile of a bundle: what calibration learnt of how layers follow each other. Its format is
// written down in docs/bundle-format.md.
//
// Header and size are checked against the model before anything is allocated by them; the bytes are charged
// to the budget, and checksum and numbers are checked when they are read.
//
// Threads: immutable. Ownership: owns its bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "bundle/bundle.h"
#include "platform/memory.h"

namespace edgert {

inline constexpr std::string_view kRoutingProfile = "routing_profile.bin";  // the asset's name

class RoutingProfile {
 public:
  enum Part : std::uint32_t { dictionary = 1, correction = 2 };

  // The bundle's asset; nullptr where it has none.
  static const Manifest::Asset* find(const Manifest& manifest) noexcept;
  // What reading it charges; 0 where there is none.
  static std::uint64_t charged_bytes(const Manifest& manifest) noexcept;

  // That of a bundle, which REQUIRES that it has one, or what such a file holds. `rows`: how many experts
  // each layer with routed experts has. Error{corrupt} by file and offset, Error{unsupported} for a newer
  // version, Error{budget}.
  RoutingProfile(const Bundle& bundle, std::span<const int> rows, int hidden, std::shared_ptr<Budget> budget);
  RoutingProfile(std::span<const std::byte> bytes, const std::string& where, std::span<const int> rows,
                 int hidden);

  bool has(Part part) const noexcept { return (parts_ & part) != 0; }
  // The dictionary: log of each expert's frequency [experts], and what an active expert of the row `distance`
  // (1 or 2) rows before adds to each of this row's, f16 [experts]. REQUIRES the part and row >= distance.
  std::span<const float> base(int row) const noexcept;
  std::span<const std::uint16_t> addend(int row, int distance, int expert) const noexcept;
  // From the router's input of the row before to this row's logits: what is added [experts], and a matrix,
  // packed int8 [experts, hidden]. REQUIRES the part and row >= 1.
  std::span<const float> shift(int row) const noexcept;
  std::span<const std::byte> matrix(int row) const noexcept;

 private:
  struct Row {  // with offsets of its arrays
    std::size_t experts = 0;
    std::size_t base = 0;
    std::size_t addend[2] = {0, 0};
    std::size_t shift = 0;
    std::size_t matrix = 0;
    std::size_t matrix_bytes = 0;
  };
  void check_header(std::span<const std::byte> header, std::uint64_t bytes, const std::string& where,
                    std::span<const int> rows, int hidden);
  std::size_t lay_out(std::size_t hidden);  // returns the whole size
  void check_content(const std::string& where, std::size_t hidden) const;

  std::uint32_t parts_ = 0;
  std::vector<Row> rows_;
  Buffer bytes_;
};

}  // namespace edgert
