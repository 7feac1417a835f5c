// Patches that an adapter's file has, of that adapter alone at scale 1, compiled when the file was made: they
// are read where they are wanted, and nothing else of the adapter is in memory.
//
// Those of some targets are kept once they were read; the others' are read every time, into one of a few
// scratch areas.
#pragma once

#include <array>
#include <atomic>
#include <string>
#include <vector>

#include "adapters/patch_set.h"
#include "storage/file.h"

namespace edgert {

// Where a file has them, as matrix_patch.h lays them out.
struct PatchFile {
  struct Place {
    std::string target;
    std::uint64_t offset;
    std::uint64_t bytes;
  };
  std::shared_ptr<const File> file;
  std::vector<Place> places;
  PatchCounts counts;
  std::shared_ptr<std::atomic<std::uint64_t>> bytes_read;  // where they are counted
};

class StoredPatches final : public PatchSet {
 public:
  // `kept`: targets below it are. REQUIRES an adapter that adds nothing but what the patches do.
  // Error{corrupt} for places and matrices that cannot be, Error{budget}.
  StoredPatches(const Targets& targets, const FormatOf& format_of, const AdapterMix& mix, PatchFile file,
                int kept, std::shared_ptr<Budget> budget);

  // REQUIRES one expert's matrices where they are not kept. Error{corrupt} and Error{io} name file and
  // offset.
  std::unique_lock<std::mutex> bring(std::span<const int> targets) override;
  bool keeps_all() const noexcept override { return all_; }

 private:
  static constexpr std::size_t kTogether = 3;   // matrices of an expert
  static constexpr std::size_t kScratches = 4;  // as many experts are seldom read at once
  std::unique_lock<std::mutex> take_scratch(std::size_t& at);
  bool keeps(int target) const noexcept { return target < kept_; }
  int add(const Targets& targets, const FormatOf& format_of, const PatchFile::Place& place);  // its target
  void read(std::span<const std::size_t> places, std::size_t at);
  [[noreturn]] void fail(const PatchFile::Place& place, const std::string& what) const;

  PatchFile file_;  // a place a matrix, as they follow in the file
  const int kept_;
  const bool all_;
  std::vector<std::size_t> at_;           // by matrix: in memory_, of those that are kept
  std::vector<std::uint64_t> checksums_;  // by matrix, of what was read first; 0 before
  std::size_t scratches_ = 0;             // in memory_, behind those
  std::size_t scratch_bytes_ = 0;
  std::array<std::mutex, kScratches> scratch_mutexes_;
};

}  // namespace edgert
