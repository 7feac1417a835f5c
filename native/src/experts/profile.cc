#include "experts/profile.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "bundle/xxhash.h"
#include "platform/error.h"
#include "quant/pack.h"

namespace edgert {
namespace {

constexpr std::array<char, 8> kMagic = {'E', 'D', 'G', 'E', 'R', 'T', 'R', 'P'};
constexpr std::uint32_t kVersion = 1;
constexpr std::uint32_t kAllParts = RoutingProfile::dictionary | RoutingProfile::correction;
constexpr std::size_t kHeader = 64;
constexpr std::size_t kLine = 64;
constexpr FormatId kFormat = FormatId::int8;

std::size_t at(int index) { return static_cast<std::size_t>(index); }

[[noreturn]] void fail(const std::string& where, std::size_t offset, const std::string& message) {
  throw Error(ErrorKind::corrupt, where + ": offset " + std::to_string(offset) + ": " + message);
}

void expect_number(const std::string& where, std::size_t offset, const char* what, std::uint64_t found,
                   std::uint64_t wanted) {
  if (found == wanted) return;
  fail(where, offset,
       std::string(what) + ": found " + std::to_string(found) + ", this model has " + std::to_string(wanted));
}

}  // namespace

const Manifest::Asset* RoutingProfile::find(const Manifest& manifest) noexcept {
  for (const Manifest::Asset& asset : manifest.assets) {
    if (asset.name == kRoutingProfile) return &asset;
  }
  return nullptr;
}

std::uint64_t RoutingProfile::charged_bytes(const Manifest& manifest) noexcept {
  const Manifest::Asset* asset = find(manifest);
  return asset == nullptr ? 0 : round_up(asset->bytes, page_size());
}

RoutingProfile::RoutingProfile(const Bundle& bundle, std::span<const int> rows, int hidden,
                               std::shared_ptr<Budget> budget) {
  const Manifest::Asset& asset = *find(bundle.manifest());
  const auto file = File::open(bundle.path() / asset.name, DirectIo::off);
  const std::string where = file->path().string();
  std::array<std::byte, kHeader> header{};
  file->read(0, std::span(header).first(std::min<std::uint64_t>(kHeader, file->bytes())));
  check_header(header, file->bytes(), where, rows, hidden);
  bytes_ = Buffer(std::move(budget), file->bytes(), "routing profile");
  file->read(0, bytes_.span());
  if (xxh64(bytes_.span()) != asset.checksum)
    fail(where, 0, "checksum differs from the manifest's; convert or copy the bundle again");
  check_content(where, at(hidden));
}

RoutingProfile::RoutingProfile(std::span<const std::byte> bytes, const std::string& where,
                               std::span<const int> rows, int hidden) {
  std::array<std::byte, kHeader> header{};
  std::copy_n(bytes.begin(), std::min(kHeader, bytes.size()), header.begin());
  check_header(header, bytes.size(), where, rows, hidden);
  bytes_ = Buffer(nullptr, bytes.size(), "routing profile");
  std::copy(bytes.begin(), bytes.end(), bytes_.data());
  check_content(where, at(hidden));
}

void RoutingProfile::check_header(std::span<const std::byte> header, std::uint64_t bytes,
                                  const std::string& where, std::span<const int> rows, int hidden) {
  const auto word = [&](std::size_t offset) {
    std::uint32_t value = 0;
    std::memcpy(&value, header.data() + offset, sizeof value);
    return value;
  };
  if (std::memcmp(header.data(), kMagic.data(), kMagic.size()) != 0) fail(where, 0, "not a routing profile");
  if (word(8) > kVersion) {
    throw Error(ErrorKind::unsupported, where + ": version " + std::to_string(word(8)) +
                                            ", this edgert reads up to " + std::to_string(kVersion) +
                                            "; update edgert or convert the model again with this one");
  }
  if (word(8) == 0) fail(where, 8, "version: found 0, allowed 1");
  expect_number(where, 12, "layers with routed experts", word(12), rows.size());
  expect_number(where, 16, "hidden size", word(16), at(hidden));
  parts_ = word(20);
  if ((parts_ & ~kAllParts) != 0)
    fail(where, 20, "parts: found " + std::to_string(parts_) + ", allowed 0 to " + std::to_string(kAllParts));
  for (const int experts : rows) rows_.push_back({.experts = at(experts)});
  const std::size_t wanted = lay_out(at(hidden));
  if (bytes != wanted)
    fail(where, bytes, "ends here, its header makes it " + std::to_string(wanted) + " bytes long");
}

std::size_t RoutingProfile::lay_out(std::size_t hidden) {
  std::size_t offset = round_up(kHeader + rows_.size() * sizeof(std::uint32_t), kLine);
  const auto take = [&](std::size_t bytes) {
    const std::size_t begin = offset;
    offset = round_up(offset + bytes, kLine);
    return begin;
  };
  if (has(dictionary)) {
    for (std::size_t n = 0; n < rows_.size(); ++n) {
      Row& row = rows_[n];
      row.base = take(row.experts * sizeof(float));
      for (std::size_t d = 1; d <= std::min<std::size_t>(n, 2); ++d)
        row.addend[d - 1] = take(rows_[n - d].experts * row.experts * sizeof(std::uint16_t));
    }
  }
  if (has(correction)) {
    for (std::size_t n = 1; n < rows_.size(); ++n) {
      rows_[n].shift = take(rows_[n].experts * sizeof(float));
      rows_[n].matrix_bytes = packed_bytes(format(kFormat), rows_[n].experts, hidden);
      rows_[n].matrix = take(rows_[n].matrix_bytes);
    }
  }
  return offset;
}

void RoutingProfile::check_content(const std::string& where, std::size_t hidden) const {
  const auto finite = [&](float value, std::size_t offset) {
    if (!std::isfinite(value))
      fail(where, offset, "the array from here on holds a number that is not finite");
  };
  std::vector<float> weights(hidden);
  for (std::size_t n = 0; n < rows_.size(); ++n) {
    const Row& r = rows_[n];
    const int row = static_cast<int>(n);
    const std::size_t offset = kHeader + n * sizeof(std::uint32_t);
    expect_number(where, offset, "experts", bytes_.as<std::uint32_t>()[offset / sizeof(std::uint32_t)],
                  r.experts);
    if (has(dictionary)) {
      for (const float value : base(row)) finite(value, r.base);
      for (std::size_t d = 1; d <= std::min<std::size_t>(n, 2); ++d) {
        for (std::size_t i = 0; i < rows_[n - d].experts; ++i) {
          for (const std::uint16_t value : addend(row, static_cast<int>(d), static_cast<int>(i)))
            finite(half_to_float(value), r.addend[d - 1]);
        }
      }
    }
    if (!has(correction) || n == 0) continue;
    for (const float value : shift(row)) finite(value, r.shift);
    for (std::size_t e = 0; e < r.experts; ++e) {
      unpack_row(format(kFormat), matrix(row), r.experts, hidden, e, weights);
      for (const float value : weights) finite(value, r.matrix);
    }
  }
}

std::span<const float> RoutingProfile::base(int row) const noexcept {
  const Row& r = rows_[at(row)];
  return {reinterpret_cast<const float*>(bytes_.data() + r.base), r.experts};
}

std::span<const std::uint16_t> RoutingProfile::addend(int row, int distance, int expert) const noexcept {
  const Row& r = rows_[at(row)];
  const auto* table = reinterpret_cast<const std::uint16_t*>(bytes_.data() + r.addend[distance - 1]);
  return {table + at(expert) * r.experts, r.experts};
}

std::span<const float> RoutingProfile::shift(int row) const noexcept {
  const Row& r = rows_[at(row)];
  return {reinterpret_cast<const float*>(bytes_.data() + r.shift), r.experts};
}

std::span<const std::byte> RoutingProfile::matrix(int row) const noexcept {
  const Row& r = rows_[at(row)];
  return bytes_.span().subspan(r.matrix, r.matrix_bytes);
}

}  // namespace edgert
