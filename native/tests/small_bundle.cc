#include "small_bundle.h"

#include <cmath>
#include <cstdio>
#include <fstream>
#include <random>
#include <sstream>

#include "bundle/xxhash.h"
#include "model/split_expert.h"
#include "platform/memory.h"
#include "quant/pack.h"

namespace edgert::test {
namespace {

constexpr std::size_t kAlignment = 4096;
constexpr char kBundleId[] = "000102030405060708090a0b0c0d0e0f";

std::string hex(std::uint64_t value) {
  char text[17];
  std::snprintf(text, sizeof(text), "%016llx", static_cast<unsigned long long>(value));
  return text;
}

class Writer {
 public:
  explicit Writer(const SmallModel& model) : m_(model) {}

  void write(const std::filesystem::path& directory) {
    std::string dense = header(0);
    std::string experts = header(1);
    tensors(dense);
    expert_files(experts);
    for (std::string* file : {&dense, &experts}) file->resize(round_up(file->size(), kAlignment));
    save(directory / "dense.bin", dense);
    save(directory / "experts-00000.bin", experts);
    std::ostringstream rest;
    rest << R"("format_version":1,"bundle_id":")" << kBundleId << R"(","alignment":)" << kAlignment
         << R"(,"recipe":)" << recipe() << R"(,"files":[{"name":"dense.bin","bytes":)" << dense.size()
         << R"(},{"name":"experts-00000.bin","bytes":)" << experts.size() << R"(}],"tensors":[)"
         << tensor_rows_ << R"(],"expert_formats":[)" << format_rows_ << R"(],"experts":[)" << expert_rows_
         << R"(],"assets":[]})";
    const std::string body = rest.str();
    const std::uint64_t checksum = xxh64(std::as_bytes(std::span(body)));
    save(directory / "manifest.json", "{\"checksum\":\"" + hex(checksum) + "\",\n" + body);
  }

 private:
  static std::string header(char index) {
    std::string bytes("EDGERT\0\1", 8);
    bytes += std::string("\1\0\0\0", 4) + index + std::string(3, '\0');
    for (char i = 0; i < 16; ++i) bytes += i;
    bytes.resize(kAlignment);
    return bytes;
  }

  static void save(const std::filesystem::path& path, std::string_view bytes) {
    std::ofstream(path, std::ios::binary) << bytes;
  }

  std::string random(const std::string& name, int rows, int cols, float scale) {
    std::normal_distribution<float> normal(0, scale);
    std::vector<float> values(static_cast<std::size_t>(rows * cols));
    for (float& v : values) v = normal(random_);
    const Format& f = format(name);
    const auto r = static_cast<std::size_t>(rows);
    const auto c = static_cast<std::size_t>(cols);
    std::string packed(packed_bytes(f, r, c), '\0');
    pack_tiles(f, SourceType::f32, std::as_bytes(std::span(values)), r, c, 0, (r + kTileRows - 1) / kTileRows,
               std::as_writable_bytes(std::span(packed)));
    return packed;
  }

  void tensor(std::string& dense, const std::string& name, const std::string& format_name, int rows, int cols,
              float scale) {
    std::string bytes;
    std::string shape = "[" + std::to_string(cols) + "]";
    if (rows == 0) {  // a norm's vector
      std::vector<float> ones(static_cast<std::size_t>(cols), 1.0F);
      bytes.assign(reinterpret_cast<const char*>(ones.data()), ones.size() * sizeof(float));
    } else {
      bytes = random(format_name, rows, cols, scale);
      shape = "[" + std::to_string(rows) + "," + std::to_string(cols) + "]";
    }
    dense.resize(round_up(dense.size(), 64));
    tensor_rows_ += (tensor_rows_.empty() ? "" : ",") + std::string(R"({"name":")") + name +
                    R"(","format":")" + (rows == 0 ? "f32" : format_name) + R"(","shape":)" + shape +
                    R"(,"file":0,"offset":)" + std::to_string(dense.size()) + R"(,"bytes":)" +
                    std::to_string(bytes.size()) + R"(,"checksum":")" +
                    hex(xxh64(std::as_bytes(std::span(bytes)))) + R"("})";
    dense += bytes;
  }

  void tensors(std::string& dense) {
    const float spread = 1.0F / std::sqrt(static_cast<float>(m_.hidden));
    tensor(dense, "embedding", m_.dense_format, m_.vocab, m_.hidden, 1);
    tensor(dense, "final_norm", "", 0, m_.hidden, 0);
    for (int i = 0; i < m_.layers; ++i) {
      const std::string p = "layers." + std::to_string(i) + ".";
      tensor(dense, p + "attention_norm", "", 0, m_.hidden, 0);
      tensor(dense, p + "ffn_norm", "", 0, m_.hidden, 0);
      tensor(dense, p + "attention.q", m_.dense_format, 4 * 16, m_.hidden, spread);
      tensor(dense, p + "attention.k", m_.dense_format, 2 * 16, m_.hidden, spread);
      tensor(dense, p + "attention.v", m_.dense_format, 2 * 16, m_.hidden, spread);
      tensor(dense, p + "attention.o", m_.dense_format, m_.hidden, 4 * 16, spread);
      tensor(dense, p + "router", "f32", m_.experts, m_.hidden, 1);
    }
  }

  // Puts base and refinement in the place of a whole; returns what its row in the manifest goes on with.
  std::string split(std::string& extent, const std::string& f) const {
    FfnRecipe ffn;
    ffn.intermediate_size = m_.intermediate;
    const auto hidden = static_cast<std::size_t>(m_.hidden);
    const FormatId id = format(f).id;
    const SplitLayout layout = split_layout({id, id, id}, hidden, ffn);
    std::string parts(layout.bytes, '\0');
    split_expert(layout, hidden, ffn, std::as_bytes(std::span(extent)),
                 std::as_writable_bytes(std::span(parts)));
    extent = parts;
    const auto bytes = std::as_bytes(std::span(extent));
    return "," + std::to_string(layout.base.bytes) + ",\"" + hex(xxh64(bytes.first(layout.base.bytes))) +
           "\",\"" + hex(xxh64(bytes.subspan(layout.refinement_offset))) + "\"";
  }

  void expert_files(std::string& file) {
    for (const std::string& f : m_.expert_formats) {
      format_rows_ += (format_rows_.empty() ? "[\"" : ",[\"") + f + "\",\"" + f + "\",\"" + f + "\"]";
    }
    const float spread = 1.0F / std::sqrt(static_cast<float>(m_.hidden));
    for (int i = 0; i < m_.layers; ++i) {
      std::string rows;
      for (int e = 0; e < m_.experts; ++e) {
        const std::size_t kind = static_cast<std::size_t>(e) % m_.expert_formats.size();
        const std::string& f = m_.expert_formats[kind];
        std::string extent = random(f, m_.intermediate, m_.hidden, spread);
        extent.resize(round_up(extent.size(), 64));
        extent += random(f, m_.intermediate, m_.hidden, spread);
        extent.resize(round_up(extent.size(), 64));
        extent += random(f, m_.hidden, m_.intermediate, spread);
        const std::string planes = m_.split_experts ? split(extent, f) : "";
        file.resize(round_up(file.size(), kAlignment));
        rows += (rows.empty() ? "[1," : ",[1,") + std::to_string(file.size()) + "," +
                std::to_string(extent.size()) + ",\"" + hex(xxh64(std::as_bytes(std::span(extent)))) + "\"," +
                std::to_string(kind) + planes + "]";
        file += extent;
      }
      expert_rows_ += (expert_rows_.empty() ? "" : ",") + std::string(R"({"layer":)") + std::to_string(i) +
                      R"(,"extents":[)" + rows + "]}";
    }
  }

  std::string recipe() const {
    std::ostringstream out;
    out << R"({"version":1,"architecture":"small","hidden_size":)" << m_.hidden << R"(,"vocab_size":)"
        << m_.vocab << R"(,"context_length":)" << m_.context
        << R"(,"embedding":{"scale":1.0},"output":{"tied":true,"scale":1.0},"final_norm_eps":1e-6,"blocks":[{)"
        << R"("norm_eps":1e-6,"residual_scale":1.0,"mixer":{"kind":"attention","num_heads":4,"num_kv_heads":2,)"
        << R"("head_dim":16,"scale":0.25,"qkv_bias":false,"output_bias":false,"qk_norm":null,"clip_qkv":null,)"
        << R"("window":null,"rope":{"layout":"half","inv_freq":[1.0,0.3,0.1,0.03],"attention_factor":1.0}},)"
        << R"("ffn":{"kind":"moe","num_experts":)" << m_.experts << R"(,"num_experts_per_tok":)"
        << m_.per_token << R"(,"moe_intermediate_size":)" << m_.intermediate
        << R"(,"activation":"silu","router":{"scoring":"softmax","normalize":true,"scale":1.0},"shared":null}}],)"
        << R"("layers":[0)";
    for (int i = 1; i < m_.layers; ++i) out << ",0";
    out << "]}";
    return out.str();
  }

  const SmallModel& m_;
  std::mt19937 random_{7};
  std::string tensor_rows_, format_rows_, expert_rows_;
};

}  // namespace

std::filesystem::path write_small_bundle(const std::filesystem::path& parent, const SmallModel& model) {
  const std::filesystem::path directory = parent / "small.edgert";
  std::filesystem::create_directories(directory);
  Writer(model).write(directory);
  return directory;
}

}  // namespace edgert::test
