// Tiles whose errors are weighed by moments: column by column, each making up for the errors of those before
// it, then each column of codes once more with all others as they are.
#include <algorithm>
#include <cmath>
#include <vector>

#include "quant/layout.h"
#include "quant/stretch.h"
#include "quant/tile.h"
#include "quant/weighted_search.h"

namespace edgert {

namespace {

constexpr std::size_t kRows = kTileRows;
constexpr int kPasses = 2;  // more change little
constexpr float kRemainderSteps = 200.0F;

class WeightedTile {
 public:
  WeightedTile(const TileTask& task, const std::byte* source, std::size_t row)
      : format_(task.format),
        moments_(task.moments),
        cols_(task.cols),
        width_(static_cast<std::size_t>(task.format.group)),
        block_(static_cast<std::size_t>(task.format.block)),
        weights_(cols_),
        errors_(cols_),
        values_(cols_),
        scales_((cols_ + width_ - 1) / width_) {
    Stretch stretch;
    for (std::size_t first = 0; first < cols_; first += Stretch::kMaxCols) {
      stretch.load(task.format, task.type, source, row, task.rows, first, cols_, Stretch::kMaxCols);
      for (std::size_t r = 0; r < kRows; ++r) {
        for (std::size_t c = 0; c < stretch.used(); ++c) weights_[first + c].at(r) = stretch.row(r)[c];
      }
    }
    if (moments_ == nullptr) ones_.assign(cols_, 1.0F);
  }

  void quantize() {
    targets_ = weights_;
    for (std::size_t first = 0; first < cols_; first += width_) {
      if (format_.has_blocks() && first % block_ == 0) start_block(first);
      quantize_group(first);
    }
    if (is_full()) improve();
  }

  void store(const TileLayout& layout, std::byte* tile) const {
    for (std::size_t block = 0; block < layout.blocks(); ++block) {
      std::vector<BlockRow> rows(kRows);
      for (std::size_t r = 0; r < kRows; ++r) rows[r] = block_row(block, r);
      layout.store_block(tile, block, std::span<const BlockRow, kRows>(rows));
    }
  }

  void store_remainder(std::int8_t* remainder, std::size_t present) const {
    for (std::size_t r = 0; r < present; ++r) {
      for (std::size_t c = 0; c < cols_; ++c) {
        const float steps = errors_[c].at(r) * scales_[c / width_].inverse.at(r) * kRemainderSteps;
        remainder[r * cols_ + c] =
            static_cast<std::int8_t>(std::nearbyint(std::clamp(steps, -127.0F, 127.0F)));
      }
    }
  }

  PackReport report() const {
    PackReport report;
    for (std::size_t c = 0; c < cols_; ++c) {
      for (std::size_t r = 0; r < kRows; ++r) {
        const double weight = static_cast<double>(weights_[c].at(r)),
                     error = static_cast<double>(errors_[c].at(r));
        report.squared_weight += weight * weight;
        report.squared_error += error * error;
        report.max_error = std::max(report.max_error, std::fabs(error));
      }
    }
    report.weighted_error =
        moments_ == nullptr ? report.squared_error : weighted_error(*moments_, errors_.data());
    return report;
  }

 private:
  bool is_full() const noexcept { return moments_ != nullptr && moments_->is_full(); }

  // The groups of a block share an f16, chosen so that the largest integer covers what the block has to hold.
  void start_block(std::size_t first) {
    const std::size_t end = std::min(first + block_, cols_);
    Rows largest{};
    for (std::size_t j = first; j < end; ++j) {
      Rows target = weights_[j];
      if (is_full()) add_products(target, moments_->feedback(j), errors_.data(), first);
      for (int part = 0; part < kRowLanes; ++part)
        largest.lanes[part] = max(largest.lanes[part], abs(target.lanes[part]));
    }
    units_.push_back(block_unit(format_, largest));
  }

  void quantize_group(std::size_t first) {
    WeightedGroup group{};
    group.count = std::min(width_, cols_ - first);
    group.weights = weights_.data() + first;
    group.targets = targets_.data() + first;
    group.importance = (moments_ == nullptr ? ones_.data() : moments_->importance().data()) + first;
    if (is_full()) {
      group.feedback = moments_->feedback(first) + first;
      group.stride = cols_;
      for (std::size_t j = first; j < first + group.count; ++j)
        add_products(targets_[j], moments_->feedback(j), errors_.data(), first);
    }
    scales_[first / width_] = fit_weighted(format_, group, format_.has_blocks() ? &units_.back() : nullptr,
                                           values_.data() + first, errors_.data() + first);
  }

  // Takes every code to the best one while the others stay, by the gradient of e (M + damping) e^T.
  void improve() {
    std::vector<Rows> gradient(cols_);
    const Lanes damping = lanes(moments_->damping());
    for (std::size_t j = 0; j < cols_; ++j) {
      for (int part = 0; part < kRowLanes; ++part) gradient[j].lanes[part] = damping * errors_[j].lanes[part];
      add_products(gradient[j], moments_->row(j), errors_.data(), cols_);
    }
    for (int pass = 0; pass < kPasses; ++pass) {
      for (std::size_t j = 0; j < cols_; ++j) {
        Rows change;
        if (!improve_column(j, gradient[j], change)) continue;
        const float* const row = moments_->row(j);
        for (std::size_t k = 0; k < cols_; ++k) {
          for (int part = 0; part < kRowLanes; ++part)
            gradient[k].lanes[part] -= lanes(row[k]) * change.lanes[part];
        }
        for (int part = 0; part < kRowLanes; ++part) gradient[j].lanes[part] -= damping * change.lanes[part];
      }
    }
  }

  // Whether any row's code of column j changes, and by how much its weight does.
  bool improve_column(std::size_t j, const Rows& gradient, Rows& change) {
    const GroupScale& scale = scales_[j / width_];
    const Lanes step = lanes(1.0F / (moments_->diagonal(j) + moments_->damping()));
    IntLanes any{};
    for (int part = 0; part < kRowLanes; ++part) {
      Lanes& value = values_[j].lanes[part];
      const Lanes now = scale.scale.lanes[part] * value;
      const Lanes nearest = nearest_value(format_, scale, part, now + gradient.lanes[part] * step);
      change.lanes[part] = scale.scale.lanes[part] * nearest - now;
      any |= change.lanes[part] != Lanes{};
      value = nearest;
      errors_[j].lanes[part] = weights_[j].lanes[part] - scale.scale.lanes[part] * nearest;
    }
    return (any[0] | any[1] | any[2] | any[3]) != 0;
  }

  BlockRow block_row(std::size_t block, std::size_t r) const {
    BlockRow row;
    row.codes.fill(0);
    const CodebookValues book = codebook_values(format_.codebook);
    const std::size_t begin = block * block_, end = std::min(begin + block_, cols_);
    if (format_.zero == ZeroType::u8) row.zeros[0] = zero_code(begin / width_, r);
    if (format_.codebook == Codebook::none)
      row.codes.fill(format_.zero == ZeroType::none ? std::uint8_t(1 << (format_.bits - 1)) : row.zeros[0]);
    for (std::size_t c = begin; c < end; ++c) {
      const auto value = static_cast<int>(values_[c].at(r));
      const int code = format_.codebook == Codebook::none
                           ? value + static_cast<int>(scales_[c / width_].zero.at(r))
                           : static_cast<int>(std::find(book.begin(), book.end(), value) - book.begin());
      row.codes[c - begin] = static_cast<std::uint8_t>(code);
    }
    if (!format_.has_blocks()) {
      row.scale = float_to_half(scales_[begin / width_].scale.at(r));
      return row;
    }
    const float unit = units_[block].at(r);
    row.scale = float_to_half(unit);
    for (std::size_t g = 0; begin + g * width_ < end && unit > 0; ++g) {
      const float scale = scales_[begin / width_ + g].scale.at(r);
      row.group_scales[g] = static_cast<std::int8_t>(std::lround(scale / unit));
    }
    return row;
  }

  std::uint8_t zero_code(std::size_t group, std::size_t r) const noexcept {
    return static_cast<std::uint8_t>(scales_[group].zero.at(r));
  }

  const Format& format_;
  const Moments* const moments_;
  const std::size_t cols_, width_, block_;  // columns: of the matrix, a group and a block
  std::vector<Rows> weights_;
  std::vector<Rows> targets_;
  std::vector<Rows> errors_;
  std::vector<Rows> values_;
  std::vector<GroupScale> scales_;
  std::vector<Rows> units_;
  std::vector<float> ones_;
};

}  // namespace

double weighted_error(const Moments& moments, const Rows* errors) noexcept {
  double sum = 0;
  for (std::size_t j = 0; j < moments.cols(); ++j) {
    Rows product{};
    if (moments.is_full()) add_products(product, moments.row(j), errors, moments.cols());
    for (std::size_t r = 0; r < kRows; ++r) {
      const float weighed = moments.is_full() ? product.at(r) : moments.diagonal(j) * errors[j].at(r);
      sum += static_cast<double>(weighed) * static_cast<double>(errors[j].at(r));
    }
  }
  return std::max(sum, 0.0);
}

PackReport pack_weighted_tile(const TileTask& task, const TileLayout& layout, const std::byte* source,
                              std::size_t row, std::byte* tile, std::int8_t* remainder) {
  WeightedTile packing(task, source, row);
  packing.quantize();
  packing.store(layout, tile);
  if (remainder != nullptr) packing.store_remainder(remainder, std::min(kRows, task.rows - row));
  return packing.report();
}

}  // namespace edgert
