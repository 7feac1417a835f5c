#include "bundle/bundle.h"

#include <algorithm>
#include <cstddef>
#include <span>

#include "bundle/manifest_parse.h"
#include "bundle/xxhash.h"
#include "platform/error.h"
#include "platform/memory.h"

namespace edgert {
namespace {

constexpr std::size_t kVerifyChunk = 4 << 20;

struct Checked {
  std::string what;
  Extent extent;
};

// Calls body(offset, bytes) over a range of a file, through an aligned window, so that direct files take it.
template <class Body>
void for_each_chunk(const File& file, const Extent& range, const Buffer& window, Body&& body) {
  std::uint64_t at = range.offset;
  const std::uint64_t end = range.offset + range.bytes;
  while (at < end) {
    const std::uint64_t from = at / File::kDirectAlignment * File::kDirectAlignment;
    const std::uint64_t stop =
        std::min<std::uint64_t>(from + window.size(), round_up(end, File::kDirectAlignment));
    const auto bytes = window.span().first(std::min<std::uint64_t>(stop, file.bytes()) - from);
    file.read(from, bytes);
    const std::uint64_t upto = std::min(end, from + bytes.size());
    body(at, std::span<const std::byte>(bytes.subspan(at - from, upto - at)));
    at = upto;
  }
}

// What of the files belongs to no header and none of the extents, which lie in order and do not overlap.
std::vector<Extent> gaps_between(const std::vector<Checked>& extents,
                                 const std::vector<Manifest::FileEntry>& files) {
  std::vector<Extent> gaps;
  auto next = extents.begin();
  for (std::uint32_t file = 0; file < files.size(); ++file) {
    std::uint64_t at = kHeaderBytes;
    for (; next != extents.end() && next->extent.file == file; ++next) {
      gaps.push_back({file, at, next->extent.offset - at, 0});
      at = next->extent.offset + next->extent.bytes;
    }
    gaps.push_back({file, at, files[file].bytes - at, 0});
  }
  return gaps;
}

}  // namespace

Bundle Bundle::open(const std::filesystem::path& directory, DirectIo direct) {
  Bundle bundle;
  bundle.path_ = directory;
  bundle.manifest_ = parse_manifest(read_manifest(directory), (directory / "manifest.json").string());
  release_free_heap();  // a manifest of thousands of experts takes MiB to parse
  for (std::size_t i = 0; i < bundle.manifest_.files.size(); ++i) {
    const Manifest::FileEntry& entry = bundle.manifest_.files[i];
    auto file = File::open(directory / entry.name, direct);
    if (file->bytes() != entry.bytes) {
      throw Error(ErrorKind::corrupt, file->path().string() + ": " + std::to_string(file->bytes()) +
                                          " bytes, the manifest says " + std::to_string(entry.bytes) +
                                          "; convert or copy the bundle again");
    }
    check_file_header(*file, bundle.manifest_, i);
    bundle.files_.push_back(std::move(file));
  }
  for (const Manifest::Asset& asset : bundle.manifest_.assets) {
    const auto file = File::open(directory / asset.name, DirectIo::off);
    if (file->bytes() != asset.bytes) {
      throw Error(ErrorKind::corrupt, file->path().string() + ": " + std::to_string(file->bytes()) +
                                          " bytes, the manifest says " + std::to_string(asset.bytes));
    }
  }
  return bundle;
}

const TensorEntry& Bundle::tensor(const std::string& name) const {
  const auto found = manifest_.tensors.find(name);
  if (found == manifest_.tensors.end()) {
    throw Error(ErrorKind::corrupt, (path_ / "manifest.json").string() + ": tensor '" + name +
                                        "', which the recipe needs, is missing");
  }
  return found->second;
}

std::uint64_t Bundle::verify(const std::function<void(std::uint64_t, std::uint64_t)>& progress) const {
  std::vector<Checked> all;
  for (const auto& [name, tensor] : manifest_.tensors)
    all.push_back({"tensor '" + name + "'", tensor.extent});
  for (const auto& layer : manifest_.experts) {
    for (std::size_t e = 0; e < layer.experts.size(); ++e) {
      all.push_back({"expert " + std::to_string(e) + " of layer " + std::to_string(layer.layer),
                     layer.experts[e].extent});
    }
  }
  for (const auto& [name, extent] : manifest_.remainders)
    all.push_back({"remainders of '" + name + "'", extent});
  std::sort(all.begin(), all.end(), [](const Checked& a, const Checked& b) {
    return std::pair(a.extent.file, a.extent.offset) < std::pair(b.extent.file, b.extent.offset);
  });

  const std::vector<Extent> gaps = gaps_between(all, manifest_.files);
  std::uint64_t total = 0;
  for (const auto& entry : manifest_.files) total += entry.bytes - kHeaderBytes;
  for (const auto& asset : manifest_.assets) total += asset.bytes;
  std::uint64_t done = 0;
  const auto advance = [&](std::uint64_t bytes) {
    done += bytes;
    if (progress) progress(done, total);
  };
  const Buffer window(nullptr, kVerifyChunk, "verify");
  const auto check = [&](const File& file, const std::string& what, const Extent& extent) {
    Xxh64 hash;
    for_each_chunk(file, extent, window, [&](std::uint64_t, std::span<const std::byte> bytes) {
      hash.update(bytes);
      advance(bytes.size());
    });
    if (hash.digest() != extent.checksum) {
      throw Error(ErrorKind::corrupt, file.path().string() + ": " + what + " at offset " +
                                          std::to_string(extent.offset) + " (" +
                                          std::to_string(extent.bytes) +
                                          " bytes): checksum differs; convert or copy the bundle again");
    }
  };
  for (const Checked& c : all) check(*files_[c.extent.file], c.what, c.extent);
  for (const Extent& gap : gaps) {
    const File& file = *files_[gap.file];
    for_each_chunk(file, gap, window, [&](std::uint64_t at, std::span<const std::byte> bytes) {
      const auto found =
          std::find_if(bytes.begin(), bytes.end(), [](std::byte b) { return b != std::byte{0}; });
      if (found != bytes.end()) {
        throw Error(ErrorKind::corrupt,
                    file.path().string() + ": offset " +
                        std::to_string(at + static_cast<std::uint64_t>(found - bytes.begin())) + ": byte " +
                        std::to_string(std::to_integer<int>(*found)) +
                        " where nothing is stored and 0 is needed; convert or copy the bundle again");
      }
      advance(bytes.size());
    });
  }
  for (const auto& asset : manifest_.assets) {
    const auto file = File::open(path_ / asset.name, DirectIo::off);
    check(*file, "asset", {0, 0, asset.bytes, asset.checksum});
  }
  return done;
}

}  // namespace edgert
