#include "adapters/stored_patches.h"

#include <algorithm>
#include <cstring>

#include "adapters/matrix_patch.h"
#include "platform/error.h"

namespace edgert {

StoredPatches::StoredPatches(const Targets& targets, const FormatOf& format_of, const AdapterMix& mix,
                             PatchFile file, int kept, std::shared_ptr<Budget> budget)
    : PatchSet(targets, mix), file_(std::move(file)), kept_(kept), all_(kept >= targets.count()) {
  std::sort(file_.places.begin(), file_.places.end(),
            [](const auto& a, const auto& b) { return a.offset < b.offset; });
  std::size_t largest = 0;  // of those that are not kept
  for (const PatchFile::Place& place : file_.places) {
    const int target = add(targets, format_of, place);
    at_.push_back(scratches_);
    if (keeps(target)) {
      scratches_ += place.bytes;
    } else {
      largest = std::max<std::size_t>(largest, place.bytes);
    }
  }
  checksums_.resize(at_.size());
  scratch_bytes_ = kTogether * largest;
  charge(std::move(budget), scratches_ + kScratches * scratch_bytes_);
  count(file_.counts);
}

int StoredPatches::add(const Targets& targets, const FormatOf& format_of, const PatchFile::Place& place) {
  const int target = targets.find(place.target);
  const Targets::Shape shape = targets.shape(target);
  const std::optional<FormatId> as = shape.kind == Targets::Kind::matrix ? format_of(target) : std::nullopt;
  if (!as || !takes_patches(format(*as))) fail(place, "the codes of this matrix cannot be changed");
  if (covers(target)) fail(place, "another one is of the same matrix");
  if (place.bytes < patch_header_bytes(shape.rows) || place.bytes % sizeof(std::uint64_t) != 0 ||
      place.bytes > file_.file->bytes() || place.offset > file_.file->bytes() - place.bytes)
    fail(place, std::to_string(place.bytes) + " bytes cannot be it");
  cover(target, *as, shape);
  return target;
}

void StoredPatches::fail(const PatchFile::Place& place, const std::string& what) const {
  throw Error(ErrorKind::corrupt, file_.file->path().string() + ": patch of " + place.target.substr(0, 120) +
                                      " at offset " + std::to_string(place.offset) + ": " + what +
                                      "; the adapter is damaged, or has changed since it was loaded: load it "
                                      "again, or convert it again");
}

std::unique_lock<std::mutex> StoredPatches::bring(std::span<const int> targets) {
  std::vector<std::size_t> wanted;  // matrices, as they follow in the file
  bool kept = true;
  for (const int target : targets) {
    if (!covers(target) || (keeps(target) && matrix(target).there)) continue;
    wanted.push_back(place(target));
    kept = keeps(target);
  }
  std::unique_lock<std::mutex> lock;
  std::size_t scratch = 0;
  if (!kept) lock = take_scratch(scratch);
  std::sort(wanted.begin(), wanted.end());
  for (std::size_t begin = 0, end = 0; begin < wanted.size(); begin = end) {
    const auto follows = [&](std::size_t one, std::size_t next) {
      return file_.places[one].offset + file_.places[one].bytes == file_.places[next].offset;
    };
    for (end = begin + 1; end < wanted.size() && follows(wanted[end - 1], wanted[end]);) ++end;
    const std::span<const std::size_t> run(&wanted[begin], end - begin);
    read(run, kept ? at_[run.front()] : scratch);
    for (const std::size_t one : run) scratch += file_.places[one].bytes;
  }
  return lock;
}

// One that is free, or else the last.
std::unique_lock<std::mutex> StoredPatches::take_scratch(std::size_t& at) {
  for (std::size_t i = 0; i < kScratches; ++i) {
    at = scratches_ + i * scratch_bytes_;
    std::unique_lock lock(scratch_mutexes_[i], std::try_to_lock);
    if (lock.owns_lock()) return lock;
  }
  return std::unique_lock(scratch_mutexes_[kScratches - 1]);
}

// Of matrices that follow one another in the file, and so in memory.
void StoredPatches::read(std::span<const std::size_t> run, std::size_t at) {
  const auto& first = file_.places[run.front()];
  const auto& last = file_.places[run.back()];
  const std::size_t bytes = last.offset + last.bytes - first.offset;
  file_.file->read(first.offset, {memory_.data() + at, bytes});
  *file_.bytes_read += bytes;
  for (const std::size_t one : run) {
    const PatchFile::Place& place = file_.places[one];
    Matrix& m = matrices_[one];
    std::byte* const patch = memory_.data() + at + (place.offset - first.offset);
    try {
      check_patch(format(m.format), m.rows, m.cols, {patch, place.bytes});
    } catch (const Error& error) {
      fail(place, error.what());
    }
    std::uint64_t checksum = 0;
    std::memcpy(&checksum, patch, sizeof checksum);
    if (checksums_[one] != 0 && checksums_[one] != checksum) fail(place, "it is not what it was");
    checksums_[one] = checksum;
    m.tiles = reinterpret_cast<PatchTile*>(patch + sizeof(std::uint64_t));
    m.entries = reinterpret_cast<PatchEntry*>(patch + patch_header_bytes(m.rows));
    m.there = true;
  }
}

}  // namespace edgert
