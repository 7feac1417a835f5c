// XXH64 with seed 0: the checksum of every file, tensor and extent of a bundle.
//
// Threads: an Xxh64 is used by one thread at a time; xxh64() has no state.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace edgert {

class Xxh64 {
 public:
  Xxh64() noexcept;
  void update(std::span<const std::byte> data) noexcept;
  std::uint64_t digest() const noexcept;  // of everything so far; more may follow

 private:
  static constexpr std::size_t kStripe = 32;
  void consume(const std::byte* stripe) noexcept;

  std::array<std::uint64_t, 4> lanes_;
  std::array<std::byte, kStripe> pending_{};  // the first total_ % kStripe bytes count
  std::uint64_t total_ = 0;
};

std::uint64_t xxh64(std::span<const std::byte> data) noexcept;

// As manifests write it: 16 lower-case hexadecimal digits.
std::string digest_text(std::uint64_t digest);

}  // namespace edgert
