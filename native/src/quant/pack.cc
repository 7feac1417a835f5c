#include "quant/pack.h"

#include <algorithm>
#include <string>
#include <vector>

#include "platform/cpu.h"
#include "platform/error.h"
#include "platform/thread_pool.h"
#include "quant/layout.h"
#include "quant/tile.h"

namespace edgert {

namespace {

constexpr std::size_t kRows = kTileRows;

std::string float_packers() {
  std::string names;
  for (const Format& row : formats()) {
    if (packs_floats(row)) names += (names.empty() ? "" : ", ") + std::string(row.name);
  }
  return names;
}

// The arguments of pack_tiles, checked; the tiles can then be packed in any order.
class Slab {
 public:
  Slab(const TileTask& task, std::span<const std::byte> source, std::size_t tile_begin, std::size_t tile_end,
       std::span<std::byte> destination, std::span<std::int8_t> remainder)
      : task_(task),
        source_(source.data()),
        begin_(tile_begin),
        tile_bytes_(tile_bytes(task.format, task.cols)),
        destination_(destination.data()),
        remainder_(remainder.empty() ? nullptr : remainder.data()) {
    if (!packs_floats(task.format)) {
      throw Error(ErrorKind::unsupported,
                  std::string(task.format.name) +
                      " holds weights that a file has in it; floats are packed as one of " + float_packers());
    }
    if (task.moments != nullptr && task.moments->cols() != task.cols) {
      throw Error(ErrorKind::invalid_argument, "moments of " + std::to_string(task.moments->cols()) +
                                                   " columns for a matrix of " + std::to_string(task.cols));
    }
    const std::size_t tiles = packed_bytes(task.format, task.rows, task.cols) / tile_bytes_;
    if (tile_begin > tile_end || tile_end > tiles) {
      throw Error(ErrorKind::invalid_argument, "tiles " + std::to_string(tile_begin) + " to " +
                                                   std::to_string(tile_end) + " of " + std::to_string(tiles));
    }
    const std::size_t rows = std::min(tile_end * kRows, task.rows) - std::min(tile_begin * kRows, task.rows);
    check_bytes("source", source.size(), rows * task.cols * source_bytes(task.type));
    check_bytes("destination", destination.size(), (tile_end - tile_begin) * tile_bytes_);
    if (remainder_ == nullptr) return;
    check_bytes("remainder", remainder.size(), rows * task.cols);
    if (task.format.is_float() || task.format.codebook != Codebook::none) {
      throw Error(
          ErrorKind::invalid_argument,
          std::string(task.format.name) + " has no remainder; formats of evenly spaced integers have one");
    }
  }

  PackReport pack(std::size_t tile) const {
    const std::size_t skipped = (tile - begin_) * kRows * task_.cols;
    std::byte* const to = destination_ + (tile - begin_) * tile_bytes_;
    std::fill(to, to + tile_bytes_, std::byte{0});
    return pack_tile(task_, source_ + skipped * source_bytes(task_.type), tile * kRows, to,
                     remainder_ == nullptr ? nullptr : remainder_ + skipped);
  }

 private:
  const TileTask task_;
  const std::byte* const source_;
  const std::size_t begin_;
  const std::size_t tile_bytes_;
  std::byte* const destination_;
  std::int8_t* const remainder_;
};

SourceType element_type(const Format& format) noexcept {
  switch (format.id) {
    case FormatId::f16:
      return SourceType::f16;
    case FormatId::bf16:
      return SourceType::bf16;
    default:
      return SourceType::f32;
  }
}

}  // namespace

bool packs_floats(const Format& format) noexcept {
  switch (format.codebook) {
    case Codebook::nl2:
    case Codebook::nl3:
    case Codebook::nl4:
      return true;
    default:
      return !format.has_blocks() && !format.has_minima() && format.codebook == Codebook::none;
  }
}

void PackReport::add(const PackReport& part) noexcept {
  squared_error += part.squared_error;
  squared_weight += part.squared_weight;
  max_error = std::max(max_error, part.max_error);
  weighted_error += part.weighted_error;
}

SourceType source_type(std::string_view name) {
  if (name == "f32") return SourceType::f32;
  if (name == "f16") return SourceType::f16;
  if (name == "bf16") return SourceType::bf16;
  throw Error(ErrorKind::unsupported,
              "element type '" + std::string(name) + "' cannot be packed; f32, f16 and bf16 can");
}

std::size_t source_bytes(SourceType type) noexcept { return type == SourceType::f32 ? 4 : 2; }

PackReport pack_tiles(const Format& format, SourceType type, std::span<const std::byte> source,
                      std::size_t rows, std::size_t cols, std::size_t tile_begin, std::size_t tile_end,
                      std::span<std::byte> destination, std::span<std::int8_t> remainder,
                      const Moments* moments) {
  const Slab slab({format, type, rows, cols, moments}, source, tile_begin, tile_end, destination, remainder);
  PackReport report;
  for (std::size_t tile = tile_begin; tile < tile_end; ++tile) report.add(slab.pack(tile));
  return report;
}

PackReport pack_matrix(const Format& format, SourceType type, std::span<const std::byte> source,
                       std::size_t rows, std::size_t cols, std::span<std::byte> destination,
                       std::span<std::int8_t> remainder, int threads, const Moments* moments) {
  const std::size_t tiles = packed_bytes(format, rows, cols) / tile_bytes(format, cols);
  const Slab slab({format, type, rows, cols, moments}, source, 0, tiles, destination, remainder);
  const int count = static_cast<int>(tiles);
  std::vector<PackReport> parts(tiles);
  ThreadPool pool(std::min(threads == 0 ? usable_cores() : threads, count));
  pool.run(count, 1, [&](int begin, int end, int) {
    for (int tile = begin; tile < end; ++tile) {
      parts[static_cast<std::size_t>(tile)] = slab.pack(static_cast<std::size_t>(tile));
    }
  });
  PackReport report;
  for (const PackReport& part : parts) report.add(part);
  return report;
}

void unpack_row(const Format& format, std::span<const std::byte> packed, std::size_t rows, std::size_t cols,
                std::size_t row, std::span<float> out) {
  check_bytes("packed matrix", packed.size(), packed_bytes(format, rows, cols));
  check_bytes("row", out.size_bytes(), cols * sizeof(float));
  if (row >= rows) {
    throw Error(ErrorKind::invalid_argument,
                "row " + std::to_string(row) + " of a matrix of " + std::to_string(rows) + " rows");
  }
  const std::byte* const tile = packed.data() + row / kRows * tile_bytes(format, cols);
  const std::size_t r = row % kRows;
  if (format.is_float()) {
    const SourceType type = element_type(format);
    for (std::size_t c = 0; c < cols; ++c) {
      read_floats(type, tile + (c * kRows + r) * source_bytes(type), 1, &out[c]);
    }
    return;
  }
  const TileLayout layout(format, cols);
  const std::size_t width = static_cast<std::size_t>(format.block);
  BlockRow block;
  float weights[kMaxGroup];
  for (std::size_t b = 0; b < layout.blocks(); ++b) {
    layout.load_block(tile, b, r, block);
    dequantize(format, block, weights);
    const std::size_t used = std::min(width, cols - b * width);
    std::copy_n(weights, used, out.data() + b * width);
  }
}

}  // namespace edgert
