#include "bundle/xxhash.h"

#include <doctest/doctest.h>

#include <string_view>
#include <vector>

using edgert::Xxh64;
using edgert::xxh64;

namespace {
std::span<const std::byte> bytes(std::string_view text) { return std::as_bytes(std::span(text)); }
}  // namespace

TEST_CASE("xxh64 gives the published digests") {
  CHECK(xxh64({}) == 0xEF46DB3751D8E999U);
  CHECK(xxh64(bytes("a")) == 0xD24EC4F1A98C6E5BU);
  CHECK(xxh64(bytes("abc")) == 0x44BC2CF5AD770999U);
  CHECK(xxh64(bytes("Nobody inspects the spammish repetition")) == 0xFBCEA83C8A378BF1U);
}

TEST_CASE("digests are written with 16 digits") {
  CHECK(edgert::digest_text(0) == "0000000000000000");
  CHECK(edgert::digest_text(0x0123456789ABCDEFU) == "0123456789abcdef");
}

TEST_CASE("a stream hashes as the whole does, however it is cut") {
  std::vector<std::byte> data(257);
  for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<std::byte>(i * 31 + 7);
  for (std::size_t piece = 1; piece <= 70; ++piece) {
    Xxh64 hash;
    for (std::size_t at = 0; at < data.size(); at += piece) {
      hash.update(std::span(data).subspan(at, std::min(piece, data.size() - at)));
      CHECK(hash.digest() == xxh64(std::span(data).first(std::min(at + piece, data.size()))));
    }
  }
}
