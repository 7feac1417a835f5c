#include "quant/tile.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "platform/error.h"
#include "quant/layout.h"
#include "quant/search.h"
#include "quant/stretch.h"

namespace edgert {

namespace {

constexpr std::size_t kRows = kTileRows;
constexpr float kRemainderSteps = 200.0F;

double square(float x) noexcept { return static_cast<double>(x) * static_cast<double>(x); }

PackReport pack_float_tile(const TileTask& task, const std::byte* source, std::size_t row, std::byte* tile) {
  const bool wide = task.format.id == FormatId::f32;
  const bool half = task.format.id == FormatId::f16;
  PackReport report;
  Stretch stretch;
  std::vector<Rows> errors(task.moments == nullptr ? 0 : task.cols);
  for (std::size_t first = 0; first < task.cols; first += Stretch::kMaxCols) {
    stretch.load(task.format, task.type, source, row, task.rows, first, task.cols, Stretch::kMaxCols);
    for (std::size_t r = 0; r < kRows; ++r) {
      PackReport part;
      for (std::size_t c = 0; c < stretch.used(); ++c) {
        const float weight = stretch.row(r)[c];
        const std::size_t at = (first + c) * kRows + r;
        part.squared_weight += square(weight);
        if (wide) {
          store(tile + 4 * at, weight);
          continue;
        }
        const std::uint16_t bits = half ? float_to_half(weight) : float_to_bfloat(weight);
        store(tile + 2 * at, bits);
        const float error = weight - (half ? half_to_float(bits) : bfloat_to_float(bits));
        part.squared_error += square(error);
        part.max_error = std::max(part.max_error, static_cast<double>(std::fabs(error)));
        if (!errors.empty()) errors[first + c].at(r) = error;
      }
      report.add(part);
    }
  }
  if (task.moments != nullptr && !wide) report.weighted_error = weighted_error(*task.moments, errors.data());
  return report;
}

// Codes of the columns of one group, and one more byte a column.
struct GroupCodes {
  ChunkCodes chunks[kMaxGroup / kChunkCols];
  std::uint8_t* quad(int q) noexcept { return chunks[0].quads[0] + q * 4 * kTileRows; }
  std::uint8_t at(std::size_t row, std::size_t col) const noexcept {
    return chunks[col / kChunkCols].quads[col % kChunkCols / 4][4 * row + col % 4];
  }
};
static_assert(sizeof(GroupCodes) == std::size_t{kMaxGroup} * kTileRows);  // chunks without gaps

// Four columns of four rows as the bytes of ChunkCodes: lane r takes the low byte of columns[0..3][r].
void store_quad(std::uint8_t* to, const IntLanes (&columns)[4]) noexcept {
  const IntLanes byte = {255, 255, 255, 255};
  const IntLanes bytes =
      (columns[0] & byte) | (columns[1] & byte) << 8 | (columns[2] & byte) << 16 | columns[3] << 24;
  std::memcpy(to, &bytes, sizeof bytes);
}

// Codes and remainders of rows [first_row, first_row + 4) of a group.
void encode(const GroupFit& fit, const GroupWeights& weights, std::size_t first_row, GroupCodes& codes,
            GroupCodes* remainders, PackReport& report) noexcept {
  Lanes squared_error{}, squared_weight{}, max_error{};
  const Lanes steps = fit.inverse * lanes(kRemainderSteps);
  for (int quad = 0; quad < weights.count / 4; ++quad) {
    IntLanes code[4], remainder[4];
    for (int j = 0; j < 4; ++j) {
      const Lanes weight = weights.columns[4 * quad + j];
      const Lanes q = fit.code(weight);
      const Lanes error = weight - fit.scale * q;
      squared_error += error * error;
      squared_weight += weight * weight;
      max_error = max(max_error, abs(error));
      code[j] = __builtin_convertvector(q + fit.zero, IntLanes);
      remainder[j] =
          __builtin_convertvector(round(clamp(error * steps, lanes(-127.0F), lanes(127.0F))), IntLanes);
    }
    store_quad(codes.quad(quad) + 4 * first_row, code);
    if (remainders != nullptr) store_quad(remainders->quad(quad) + 4 * first_row, remainder);
  }
  for (int lane = 0; lane < kLanes; ++lane)
    report.add({squared_error[lane], squared_weight[lane], max_error[lane]});
}

PackReport pack_integer_tile(const TileTask& task, const TileLayout& layout, const std::byte* source,
                             std::size_t row, std::byte* tile, std::int8_t* remainder) {
  PackReport report;
  Stretch stretch;
  GroupWeights weights;
  GroupCodes codes, remainders;
  const std::size_t width = static_cast<std::size_t>(task.format.group);
  weights.count = task.format.group;
  for (std::size_t group = 0; group < layout.blocks(); ++group) {
    const std::size_t first = group * width;
    stretch.load(task.format, task.type, source, row, task.rows, first, task.cols, width);
    for (std::size_t r = 0; r < kRows; r += kLanes) {
      const float* const from = stretch.row(r);
      constexpr std::size_t next = Stretch::kMaxCols;
      for (std::size_t c = 0; c < width; ++c) {
        weights.columns[c] = Lanes{from[c], from[c + next], from[c + 2 * next], from[c + 3 * next]};
      }
      const GroupFit fit = fit_group(task.format, weights);
      encode(fit, weights, r, codes, remainder == nullptr ? nullptr : &remainders, report);
      for (std::size_t lane = 0; lane < kLanes; ++lane) {
        store(tile + layout.scale_offset(group, r + lane), float_to_half(fit.scale[lane]));
        if (task.format.zero == ZeroType::none) continue;
        tile[layout.zero_offset(group, r + lane)] = std::byte{static_cast<std::uint8_t>(fit.zero[lane])};
      }
    }
    for (std::size_t chunk = 0; chunk < width / kChunkCols; ++chunk) {
      layout.store_codes(tile, group * (width / kChunkCols) + chunk, codes.chunks[chunk]);
    }
    if (remainder == nullptr) continue;
    for (std::size_t r = 0; r < std::min(kRows, task.rows - row); ++r) {
      for (std::size_t c = 0; c < stretch.used(); ++c) {
        remainder[r * task.cols + first + c] = static_cast<std::int8_t>(remainders.at(r, c));
      }
    }
  }
  return report;
}

}  // namespace

void check_bytes(const char* what, std::size_t found, std::size_t wanted) {
  if (found == wanted) return;
  throw Error(ErrorKind::invalid_argument, std::string(what) + " has " + std::to_string(found) +
                                               " bytes; needed are " + std::to_string(wanted));
}

void read_floats(SourceType type, const std::byte* from, std::size_t count, float* to) noexcept {
  switch (type) {
    case SourceType::f32:
      std::memcpy(to, from, count * sizeof(float));
      break;
    case SourceType::f16:
      for (std::size_t i = 0; i < count; ++i) to[i] = half_to_float(load<std::uint16_t>(from + 2 * i));
      break;
    case SourceType::bf16:
      for (std::size_t i = 0; i < count; ++i) to[i] = bfloat_to_float(load<std::uint16_t>(from + 2 * i));
      break;
  }
}

PackReport pack_tile(const TileTask& task, const std::byte* source, std::size_t row, std::byte* tile,
                     std::int8_t* remainder) {
  if (task.format.is_float()) return pack_float_tile(task, source, row, tile);
  const TileLayout layout(task.format, task.cols);
  // Groups apart where nothing ties them together, which is quicker.
  if (task.moments == nullptr && task.format.codebook == Codebook::none)
    return pack_integer_tile(task, layout, source, row, tile, remainder);
  return pack_weighted_tile(task, layout, source, row, tile, remainder);
}

}  // namespace edgert
