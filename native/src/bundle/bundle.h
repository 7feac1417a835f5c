// A device bundle on disk: manifest, extents, checksums. The format is written down in docs/bundle-format.md.
//
// Bundle::open validates the whole manifest against itself and against the files' sizes and headers before
// anything is allocated by what the manifest says. It does not know what a recipe computes: that is model's.
// Threads: a Bundle is immutable once open; its files may be read from any thread.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "bundle/json.h"
#include "quant/format.h"
#include "storage/reader.h"

namespace edgert {

inline constexpr int kBundleFormatVersion = 1;
inline constexpr std::size_t kHeaderBytes = 32;  // of each file

struct Extent {
  std::uint32_t file = 0;
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
  std::uint64_t checksum = 0;
};

struct TensorEntry {
  FormatId format = FormatId::f32;
  std::size_t rows = 0;  // a vector has rows = 1
  std::size_t cols = 0;
  bool is_vector = false;
  Extent extent;
};

struct ExpertEntry {
  Extent extent;
  std::uint32_t formats = 0;  // index into Manifest::expert_formats
  // Of an expert whose precision is split: the extent begins with a base that runs by itself.
  std::uint64_t base_bytes = 0;  // 0: it is not split
  std::uint64_t base_checksum = 0;
  std::uint64_t refinement_checksum = 0;  // of what follows from refinement_offset() to the extent's end

  bool is_split() const noexcept { return base_bytes > 0; }
  // In the extent; direct reads may begin there.
  static constexpr std::uint64_t refinement_offset(std::uint64_t base_bytes) noexcept {
    return (base_bytes + File::kDirectAlignment - 1) / File::kDirectAlignment * File::kDirectAlignment;
  }
};

struct ExpertFormats {
  FormatId gate = FormatId::f32;
  FormatId up = FormatId::f32;
  FormatId down = FormatId::f32;
};

struct Manifest {
  std::string bundle_id;
  std::uint64_t alignment = 0;
  Json recipe;
  struct FileEntry {
    std::string name;
    std::uint64_t bytes = 0;
  };
  std::vector<FileEntry> files;
  std::unordered_map<std::string, TensorEntry> tensors;
  std::vector<ExpertFormats> expert_formats;
  struct ExpertLayer {
    int layer = 0;
    std::vector<ExpertEntry> experts;
  };
  std::vector<ExpertLayer> experts;
  std::size_t num_experts() const noexcept {
    std::size_t count = 0;
    for (const ExpertLayer& layer : experts) count += layer.experts.size();
    return count;
  }
  struct Asset {
    std::string name;
    std::uint64_t bytes = 0;
    std::uint64_t checksum = 0;
  };
  std::vector<Asset> assets;
  std::vector<std::pair<std::string, Extent>> remainders;  // rounding remainders by tensor
};

class Bundle {
 public:
  // Error{not_found}, {corrupt}, {unsupported} (a newer version) or {io}.
  static Bundle open(const std::filesystem::path& directory, DirectIo direct);

  const std::filesystem::path& path() const noexcept { return path_; }
  const Manifest& manifest() const noexcept { return manifest_; }
  const std::shared_ptr<const File>& file(std::uint32_t index) const { return files_[index]; }
  // Error{corrupt} where the tensor is missing.
  const TensorEntry& tensor(const std::string& name) const;

  // Reads every tensor, extent and asset and compares checksums, and finds zeros between them; Error{corrupt}
  // names the first that differs. progress(done, total) may be null; it may throw to stop. Returns the bytes
  // read.
  std::uint64_t verify(const std::function<void(std::uint64_t, std::uint64_t)>& progress) const;

 private:
  std::filesystem::path path_;
  Manifest manifest_;
  std::vector<std::shared_ptr<const File>> files_;
};

// Reads manifest.json: bounded, its own checksum compared. Returns the text.
std::string read_manifest(const std::filesystem::path& directory);

}  // namespace edgert
