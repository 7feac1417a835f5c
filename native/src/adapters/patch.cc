#include "adapters/patch.h"

#include <algorithm>
#include <bit>

#include "adapters/patch_rounding.h"
#include "adapters/tile_codes.h"

namespace edgert {
namespace {

constexpr std::size_t kBack = PatchEntry::kBack;
constexpr std::size_t kWidestStep = 255 - kBack;  // three vectors
constexpr std::size_t kMostPlanes = 3;

// The entries of one plane of codes, as they are written. No vector of 64 bytes is returned to, so that
// entries without bits are at most one for three vectors.
class Trail {
 public:
  Trail() = default;
  Trail(PatchEntry* entries, std::size_t begin) noexcept : first_(entries), end_(entries), at_(begin) {}

  void add(std::size_t offset, unsigned bits) noexcept {
    if (offset > at_ + kWidestStep) approach(offset);
    put(offset, bits);
    const std::size_t changes = bits != 0 ? 1 : 0;  // no branch: nobody could foretell it
    end_ += changes;
    at_ += (offset - at_) * changes;
  }
  // Ends where the next plane begins.
  void end(std::size_t offset) noexcept {
    approach(offset);
    put(offset, 0);
    ++end_;
  }
  std::span<const PatchEntry> entries() const noexcept { return {first_, end_}; }

 private:
  void approach(std::size_t offset) noexcept {
    for (; offset > at_ + kWidestStep; at_ += kWidestStep) *end_++ = {255, 0};
  }
  void put(std::size_t offset, unsigned bits) noexcept {
    *end_ = {static_cast<std::uint8_t>(offset + kBack - at_), static_cast<std::uint8_t>(bits)};
  }
  PatchEntry* first_ = nullptr;
  PatchEntry* end_ = nullptr;
  std::size_t at_ = 0;
};

// Trails over the planes of a tile, in one room.
class Trails {
 public:
  // So many values at most.
  Trails(const Format& format, std::size_t cols, std::size_t values, PatchEntry* room) noexcept
      : room_(room) {
    const std::size_t codes = padded_cols(format, cols) * kTileRows;
    for (auto bits = static_cast<unsigned>(format.bits); bits != 0; bits -= std::bit_floor(bits)) {
      trails_[planes_] = Trail(room, begin_[planes_]);
      const std::size_t bytes = codes * std::bit_floor(bits) / 8;
      begin_[planes_ + 1] = begin_[planes_] + bytes;
      room += values + bytes / kWidestStep + 1;
      ++planes_;
    }
  }
  Trail& operator[](std::size_t plane) noexcept { return trails_[plane]; }
  // Makes one of them all; how many entries it has.
  std::size_t join() noexcept {
    PatchEntry* end = room_;
    for (std::size_t p = 0; p < planes_; ++p) {
      if (p + 1 < planes_) trails_[p].end(begin_[p + 1]);
      end = std::copy(trails_[p].entries().begin(), trails_[p].entries().end(), end);
    }
    return static_cast<std::size_t>(end - room_);
  }

 private:
  PatchEntry* room_;
  std::size_t planes_ = 0;
  std::size_t begin_[kMostPlanes + 1] = {};
  Trail trails_[kMostPlanes];
};

float remainder_of(const TileDelta& delta, std::size_t i) noexcept {
  return delta.remainders == nullptr ? 0 : static_cast<float>(delta.remainders[i]) * kRemainderStep;
}

// A delta in batches, in ascending order of places.
void in_batches(const TileDelta& delta, Batch& batch, const auto& use) {
  for (std::size_t begin = 0; begin < delta.places.size(); begin += Batch::kMost) {
    batch.count = std::min(Batch::kMost, delta.places.size() - begin);
    for (std::size_t i = 0; i < batch.count; ++i) {
      batch.places[i] = delta.places[begin + i];
      batch.deltas[i] = delta.scale * delta.values[begin + i];
      batch.remainders[i] = remainder_of(delta, begin + i);
    }
    use();
  }
}

// Those of several deltas, summed where they meet.
void in_batches(std::span<const TileDelta> deltas, Batch& batch, const auto& use) {
  if (deltas.size() == 1) return in_batches(deltas[0], batch, use);
  std::size_t next[kMostTogether] = {};
  batch.count = 0;
  for (;;) {
    std::uint64_t place = UINT64_MAX;
    for (std::size_t d = 0; d < deltas.size(); ++d) {
      if (next[d] < deltas[d].places.size())
        place = std::min<std::uint64_t>(place, deltas[d].places[next[d]]);
    }
    if (batch.count == Batch::kMost || (place == UINT64_MAX && batch.count > 0)) {
      use();
      batch.count = 0;
    }
    if (place == UINT64_MAX) return;
    float sum = 0, known = 0;
    for (std::size_t d = 0; d < deltas.size(); ++d) {
      if (next[d] == deltas[d].places.size() || deltas[d].places[next[d]] != place) continue;
      sum += deltas[d].scale * deltas[d].values[next[d]];
      if (deltas[d].remainders != nullptr) known = remainder_of(deltas[d], next[d]);
      ++next[d];
    }
    batch.places[batch.count] = static_cast<std::uint32_t>(place);
    batch.deltas[batch.count] = sum;
    batch.remainders[batch.count++] = known;
  }
}

}  // namespace

PatchRoom patch_room(const Format& format, std::size_t cols) {
  const auto planes = static_cast<std::size_t>(std::popcount(static_cast<unsigned>(format.bits)));
  return {tile_parts(format, cols).scales / kWidestStep + planes, planes};
}

std::size_t compile_patch(const Format& format, std::size_t cols, std::span<const TileDelta> deltas,
                          std::byte* tile, PatchEntry* entries, PatchCounts& counts) noexcept {
  std::size_t values = 0;
  for (const TileDelta& delta : deltas) values += delta.places.size();
  const Scales scales(format, cols, tile);
  Trails trails(format, cols, values, entries);
  Rounding nearest(format);
  Batch batch;
  with_codes(format, tile, cols, [&](const auto& codes) {
    in_batches(deltas, batch, [&] {
      batch.gather(codes, scales);
      nearest(batch);
      for (std::size_t i = 0; i < batch.count; ++i) {
        codes.planes(batch.places[i] / kTileRows, batch.places[i] % kTileRows,
                     static_cast<unsigned>(batch.changes[i]),
                     [&](std::size_t plane, std::size_t at, unsigned bits) { trails[plane].add(at, bits); });
      }
    });
  });
  counts.add(nearest.counts());
  const std::size_t used = trails.join();
  apply_patch({entries, used}, tile);
  return used;
}

void apply_patch(std::span<const PatchEntry> entries, std::byte* tile,
                 std::span<const std::byte> ahead) noexcept {
  constexpr std::size_t kLine = 64;
  std::byte* at = tile;
  const auto change = [&](PatchEntry entry) {
    at += entry.step;
    at -= PatchEntry::kBack;
    *at ^= static_cast<std::byte>(entry.bits);
  };
  const std::size_t asked = std::min(entries.size(), ahead.size() / kLine);
  for (std::size_t i = 0; i < asked; ++i) {
    __builtin_prefetch(&ahead[i * kLine], 1);
    change(entries[i]);
  }
  for (const PatchEntry entry : entries.subspan(asked)) change(entry);
}

}  // namespace edgert
