// Parsing and validation of manifest.json.
#include <algorithm>
#include <charconv>
#include <filesystem>
#include <fstream>

#include "bundle/manifest_parse.h"
#include "bundle/xxhash.h"
#include "platform/error.h"

namespace edgert {
namespace {

constexpr std::uint64_t kMaxManifestBytes = 16ULL << 20;
constexpr std::int64_t kMaxFileBytes = 1LL << 50;
constexpr std::int64_t kMaxDimension = 1LL << 31;
constexpr std::size_t kMaxFiles = 4096;
constexpr std::size_t kTensorAlignment = 64;

[[noreturn]] void corrupt(const std::string& message) { throw Error(ErrorKind::corrupt, message); }

std::uint64_t parse_checksum(const JsonField& field) {
  const std::string& text = field.as_string();
  std::uint64_t value = 0;
  const auto result = std::from_chars(text.data(), text.data() + text.size(), value, 16);
  if (text.size() != 16 || result.ptr != text.data() + text.size()) field.fail("16 hexadecimal digits");
  return value;
}

const Format& known_format(const JsonField& field) {
  const std::string name = excerpt(field.as_string());
  try {
    return format(name);
  } catch (const Error& error) {
    throw Error(error.kind(), field.path() + ": " + error.what());
  }
}

bool is_component(const std::string& name) {
  return !name.empty() && name.size() <= 255 && name[0] != '.' &&
         std::all_of(name.begin(), name.end(), [](char c) {
           return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' ||
                  c == '_' || c == '-';
         });
}

std::string file_name(const JsonField& field) {
  const std::string& name = field.as_string();
  if (!is_component(name)) field.fail("a plain file name (letters, digits, '.', '_', '-')");
  return name;
}

class ManifestParser {
 public:
  ManifestParser(const Json& json, const std::string& where) : root_(JsonField(json, where)) {}

  Manifest parse() {
    header();
    files();
    tensors();
    experts();
    assets();
    remainders();
    for (const char* key : {"provenance", "device", "defaults", "quantization"}) root_.skip(key);
    root_.finish();
    refuse_overlaps();
    return std::move(out_);
  }

 private:
  void header() {
    root_.skip("checksum");
    const JsonField version = root_.take("format_version");
    const std::int64_t found = version.as_integer(1, 1 << 30);
    if (found > kBundleFormatVersion) {
      throw Error(ErrorKind::unsupported, version.path() + ": found " + std::to_string(found) +
                                              ", this edgert reads up to " +
                                              std::to_string(kBundleFormatVersion) +
                                              "; update edgert or convert the model again with this one");
    }
    const JsonField id = root_.take("bundle_id");
    out_.bundle_id = id.as_string();
    const bool hex = std::all_of(out_.bundle_id.begin(), out_.bundle_id.end(),
                                 [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
    if (out_.bundle_id.size() != 32 || !hex) id.fail("32 lower-case hexadecimal digits");
    const JsonField alignment = root_.take("alignment");
    out_.alignment = static_cast<std::uint64_t>(alignment.as_integer(4096, 1 << 20));
    if ((out_.alignment & (out_.alignment - 1)) != 0) alignment.fail("a power of two");
    out_.recipe = root_.take("recipe").json();
  }

  void files() {
    const JsonField list = root_.take("files");
    if (list.size() > kMaxFiles) list.fail("at most " + std::to_string(kMaxFiles) + " files");
    for (std::size_t i = 0; i < list.size(); ++i) {
      JsonObject entry(list[i]);
      const JsonField bytes = entry.take("bytes");
      out_.files.push_back(
          {file_name(entry.take("name")), static_cast<std::uint64_t>(bytes.as_integer(1, kMaxFileBytes))});
      if (out_.files.back().bytes % out_.alignment != 0) bytes.fail("a multiple of the alignment");
      entry.finish();
      for (std::size_t j = 0; j < i; ++j) {
        if (out_.files[j].name == out_.files[i].name)
          corrupt(list[i].path() + ": file '" + out_.files[i].name + "' stands twice");
      }
    }
    extents_.resize(out_.files.size());
  }

  // The range of an extent, checked against its file and noted for the overlap check.
  Extent extent(const JsonField& file, const JsonField& offset, const JsonField& bytes,
                const JsonField& checksum, std::uint64_t alignment) {
    Extent e;
    if (out_.files.empty()) file.fail("an index into 'files', which is empty");
    e.file = static_cast<std::uint32_t>(file.as_integer(0, static_cast<std::int64_t>(out_.files.size()) - 1));
    e.offset = static_cast<std::uint64_t>(offset.as_integer(0, kMaxFileBytes));
    e.bytes = static_cast<std::uint64_t>(bytes.as_integer(1, kMaxFileBytes));
    e.checksum = parse_checksum(checksum);
    if (e.offset % alignment != 0) offset.fail("a multiple of " + std::to_string(alignment));
    if (e.offset < out_.alignment) offset.fail("at least the alignment, " + std::to_string(out_.alignment));
    const Manifest::FileEntry& entry = out_.files[e.file];
    if (e.offset + e.bytes > entry.bytes) {
      bytes.fail("an end inside '" + entry.name + "' (" + std::to_string(entry.bytes) +
                 " bytes) from offset " + std::to_string(e.offset));
    }
    extents_[e.file].push_back({e.offset, e.bytes});
    return e;
  }

  void tensors() {
    const JsonField list = root_.take("tensors");
    for (std::size_t i = 0; i < list.size(); ++i) {
      JsonObject entry(list[i]);
      const JsonField name_field = entry.take("name");
      const std::string& name = name_field.as_string();
      if (name.empty() || name != excerpt(name)) name_field.fail("a name of 1 to 80 bytes");
      TensorEntry tensor;
      tensor.format = known_format(entry.take("format")).id;
      const JsonField shape = entry.take("shape");
      if (shape.size() != 1 && shape.size() != 2) shape.fail("one or two dimensions");
      tensor.is_vector = shape.size() == 1;
      tensor.cols = static_cast<std::size_t>(shape[shape.size() - 1].as_integer(1, kMaxDimension - 1));
      tensor.rows =
          tensor.is_vector ? 1 : static_cast<std::size_t>(shape[0].as_integer(1, kMaxDimension - 1));
      if (tensor.rows > static_cast<std::size_t>(kMaxFileBytes) / tensor.cols)
        shape.fail("a product of at most " + std::to_string(kMaxFileBytes));
      const JsonField bytes = entry.take("bytes");
      tensor.extent =
          extent(entry.take("file"), entry.take("offset"), bytes, entry.take("checksum"), kTensorAlignment);
      const std::size_t expected = tensor.is_vector
                                       ? tensor.cols * sizeof(float)
                                       : packed_bytes(format(tensor.format), tensor.rows, tensor.cols);
      if (tensor.extent.bytes != expected)
        bytes.fail(std::to_string(expected) + " bytes, as format and shape of '" + name + "' say");
      if (tensor.is_vector && tensor.format != FormatId::f32) shape.fail("format f32 for a vector");
      entry.skip("source");
      entry.finish();
      if (!out_.tensors.emplace(name, tensor).second)
        corrupt(list[i].path() + ": tensor '" + name + "' stands twice");
    }
  }

  void experts() {
    const JsonField combinations = root_.take("expert_formats");
    for (std::size_t i = 0; i < combinations.size(); ++i) {
      const JsonField row = combinations[i];
      if (row.size() != 3) row.fail("three formats: gate, up, down");
      out_.expert_formats.push_back(
          {known_format(row[0]).id, known_format(row[1]).id, known_format(row[2]).id});
    }
    const JsonField list = root_.take("experts");
    for (std::size_t i = 0; i < list.size(); ++i) {
      JsonObject entry(list[i]);
      Manifest::ExpertLayer layer;
      const JsonField number = entry.take("layer");
      layer.layer = static_cast<int>(number.as_integer(0, 1 << 20));
      if (!out_.experts.empty() && out_.experts.back().layer >= layer.layer)
        number.fail("layers in ascending order, each once");
      const JsonField rows = entry.take("extents");
      layer.experts.reserve(rows.size());
      for (std::size_t e = 0; e < rows.size(); ++e) {
        const JsonField row = rows[e];
        if (row.size() != 5 && row.size() != 8) {
          row.fail(
              "[file, offset, bytes, checksum, format], of a split expert followed by base_bytes, "
              "base_checksum, "
              "refinement_checksum");
        }
        ExpertEntry expert;
        expert.extent = extent(row[0], row[1], row[2], row[3], out_.alignment);
        expert.formats = static_cast<std::uint32_t>(
            row[4].as_integer(0, static_cast<std::int64_t>(out_.expert_formats.size()) - 1));
        if (row.size() == 8) split(row, expert);
        layer.experts.push_back(expert);
      }
      entry.finish();
      out_.experts.push_back(std::move(layer));
    }
  }

  void split(const JsonField& row, ExpertEntry& expert) {
    const auto whole = static_cast<std::int64_t>(expert.extent.bytes);
    expert.base_bytes = static_cast<std::uint64_t>(row[5].as_integer(1, whole));
    if (ExpertEntry::refinement_offset(expert.base_bytes) >= expert.extent.bytes)
      row[5].fail("a base that leaves room for a refinement in " + std::to_string(whole) + " bytes");
    expert.base_checksum = parse_checksum(row[6]);
    expert.refinement_checksum = parse_checksum(row[7]);
  }

  void assets() {
    const JsonField list = root_.take("assets");
    if (list.size() > kMaxFiles) list.fail("at most " + std::to_string(kMaxFiles) + " files");
    for (std::size_t i = 0; i < list.size(); ++i) {
      JsonObject entry(list[i]);
      const std::string name = file_name(entry.take("name"));
      const auto bytes = static_cast<std::uint64_t>(entry.take("bytes").as_integer(0, kMaxFileBytes));
      out_.assets.push_back({name, bytes, parse_checksum(entry.take("checksum"))});
      entry.finish();
    }
  }

  void remainders() {
    if (!root_.has("remainders")) return;
    JsonObject entry(root_.take("remainders"));
    const JsonField file = entry.take("file");
    const JsonField list = entry.take("tensors");
    entry.finish();
    for (std::size_t i = 0; i < list.size(); ++i) {
      const JsonField row = list[i];
      if (row.size() != 4) row.fail("[name, offset, bytes, checksum]");
      out_.remainders.emplace_back(row[0].as_string(),
                                   extent(file, row[1], row[2], row[3], kTensorAlignment));
    }
  }

  void refuse_overlaps() {
    for (std::size_t f = 0; f < extents_.size(); ++f) {
      auto& ranges = extents_[f];
      std::sort(ranges.begin(), ranges.end());
      for (std::size_t i = 1; i < ranges.size(); ++i) {
        if (ranges[i - 1].first + ranges[i - 1].second > ranges[i].first) {
          corrupt(root_.path() + ": two extents of '" + out_.files[f].name + "' overlap at offset " +
                  std::to_string(ranges[i].first));
        }
      }
    }
  }

  JsonObject root_;
  Manifest out_;
  std::vector<std::vector<std::pair<std::uint64_t, std::uint64_t>>> extents_;  // a file: (offset, bytes)
};

}  // namespace

Manifest parse_manifest(std::string_view text, const std::string& where) {
  return ManifestParser(Json::parse(text, where), where).parse();
}

std::string read_manifest(const std::filesystem::path& directory) {
  std::error_code error;
  const auto status = std::filesystem::symlink_status(directory, error);
  if (error || status.type() == std::filesystem::file_type::not_found) {
    throw Error(ErrorKind::not_found, directory.string() + ": no such bundle");
  }
  const std::filesystem::path path = directory / "manifest.json";
  if (!std::filesystem::exists(std::filesystem::symlink_status(path, error))) {
    throw Error(
        ErrorKind::not_found,
        path.string() + ": missing; not an edgert bundle, or half-installed: convert or copy it again");
  }
  const auto file = File::open(path, DirectIo::off);
  if (file->bytes() > kMaxManifestBytes) {
    corrupt(path.string() + ": " + std::to_string(file->bytes()) + " bytes, at most " +
            std::to_string(kMaxManifestBytes) + " are allowed");
  }
  std::string text(file->bytes(), '\0');
  file->read(0, std::as_writable_bytes(std::span(text)));

  static constexpr std::string_view kPrefix = "{\"checksum\":\"";
  constexpr std::size_t kFirstLine = kPrefix.size() + 16 + 2;  // digits, '",'
  const bool shaped =
      text.size() > kFirstLine && text.starts_with(kPrefix) && text.substr(kFirstLine - 2, 3) == "\",\n";
  if (!shaped) corrupt(path.string() + ": offset 0: the first line is not {\"checksum\":\"…\",");
  const std::uint64_t found = xxh64(std::as_bytes(std::span(text).subspan(kFirstLine + 1)));
  if (text.compare(kPrefix.size(), 16, digest_text(found)) != 0) {
    corrupt(
        path.string() +
        ": checksum differs from its content; the file is damaged or was edited: convert or copy it again");
  }
  return text;
}

void check_file_header(const File& file, const Manifest& manifest, std::size_t index) {
  static constexpr unsigned char kMagic[8] = {'E', 'D', 'G', 'E', 'R', 'T', 0, 1};
  Buffer block(nullptr, File::kDirectAlignment, "header");
  file.read(0, block.span());
  const auto* bytes = reinterpret_cast<const unsigned char*>(block.data());
  const auto u32 = [&](std::size_t at) {
    return static_cast<std::uint32_t>(bytes[at]) | static_cast<std::uint32_t>(bytes[at + 1]) << 8 |
           static_cast<std::uint32_t>(bytes[at + 2]) << 16 | static_cast<std::uint32_t>(bytes[at + 3]) << 24;
  };
  const std::string name = file.path().string();
  if (!std::equal(kMagic, kMagic + 8, bytes)) corrupt(name + ": offset 0: not a file of an edgert bundle");
  if (u32(8) != kBundleFormatVersion)
    corrupt(name + ": offset 8: format version " + std::to_string(u32(8)) + ", the manifest says " +
            std::to_string(kBundleFormatVersion));
  if (u32(12) != index)
    corrupt(name + ": offset 12: file index " + std::to_string(u32(12)) + ", the manifest says " +
            std::to_string(index));
  std::string id;
  for (std::size_t i = 16; i < kHeaderBytes; ++i) {
    id += "0123456789abcdef"[bytes[i] >> 4];
    id += "0123456789abcdef"[bytes[i] & 15];
  }
  if (id != manifest.bundle_id) {
    corrupt(name + ": offset 16: belongs to bundle " + id + ", the manifest to " + manifest.bundle_id +
            "; files of two bundles are mixed");
  }
}

}  // namespace edgert
