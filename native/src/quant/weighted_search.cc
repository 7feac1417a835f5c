#include "quant/weighted_search.h"

#include <algorithm>
#include <type_traits>

#include "quant/search.h"

namespace edgert {

namespace {

constexpr int kRefinements = 2;
constexpr float kLargestInteger = 15;  // of a scale under a block's

// Candidates: scales that cover the group's range times first, first - step, ...; with zeros up to `reach`
// around that of the range.
struct Grid {
  float first, step;
  int count;
  int reach;
};

constexpr Grid grid(const Format& format) noexcept {
  const int reach = format.zero == ZeroType::none ? 0 : 1;
  switch (format.bits) {
    case 2:
      return {1.0F, 0.065F, 9, reach};
    case 3:
      return {1.06F, 0.06F, 8, reach};
    case 4:
      return {1.05F, 0.05F, 7, 0};
    default:
      return {1.0F, 0.01F, 3, 0};
  }
}

template <Codebook Book>
struct CodebookLevels {
  static constexpr int kCount = Book == Codebook::nl2 ? 4 : Book == Codebook::nl3 ? 8 : 16;
  static constexpr CodebookValues kValues = codebook_values(Book);
  static constexpr float value(int i) { return static_cast<float>(kValues[static_cast<std::size_t>(i)]); }

  static Lanes nearest(const GroupScale&, int, Lanes x) noexcept {
    Lanes q = lanes(value(0));
#pragma GCC unroll 16
    for (int i = 1; i < kCount; ++i) {
      const IntLanes above = x > lanes((value(i - 1) + value(i)) / 2);
      q += (Lanes)(above & (IntLanes)lanes(value(i) - value(i - 1)));
    }
    return q;
  }
};

struct IntegerLevels {
  static Lanes nearest(const GroupScale& scale, int part, Lanes x) noexcept {
    return round(clamp(x, scale.lowest.lanes[part], scale.highest.lanes[part]));
  }
};

template <class Body>
auto with_levels(Codebook codebook, Body&& body) {
  switch (codebook) {
    case Codebook::nl2:
      return body(CodebookLevels<Codebook::nl2>{});
    case Codebook::nl3:
      return body(CodebookLevels<Codebook::nl3>{});
    case Codebook::nl4:
      return body(CodebookLevels<Codebook::nl4>{});
    default:
      return body(IntegerLevels{});
  }
}

float largest_value(const Format& format) noexcept {
  const CodebookValues values = codebook_values(format.codebook);
  return static_cast<float>(*std::max_element(values.begin(), values.end()));
}

// The nearest scale that can be stored.
Lanes storable(Lanes scale, const Rows* unit, int part) noexcept {
  if (unit == nullptr) return to_half(scale);
  const Lanes step = unit->lanes[part];
  const Lanes ratio = step > Lanes{} ? scale / step : Lanes{};
  return step * round(clamp(ratio, Lanes{}, lanes(kLargestInteger)));
}

struct Trial {
  Rows loss;
  Rows refit;  // the scale that the values found would rather have
};

template <class Levels>
Trial attempt(const WeightedGroup& group, const GroupScale& scale, Rows* values, Rows* errors) noexcept {
  Rows loss{}, products{}, squares{};
  for (std::size_t j = 0; j < group.count; ++j) {
    Rows target = group.targets[j];
    if (group.feedback != nullptr) add_products(target, group.feedback + j * group.stride, errors, j);
    const Lanes importance = lanes(group.importance[j]);
    for (int part = 0; part < kRowLanes; ++part) {
      const Lanes wanted = target.lanes[part];
      const Lanes q = Levels::nearest(scale, part, wanted * scale.inverse.lanes[part]);
      const Lanes value = scale.scale.lanes[part] * q;
      const Lanes off = wanted - value, weighed = importance * q;
      loss.lanes[part] += importance * off * off;
      products.lanes[part] += weighed * wanted;
      squares.lanes[part] += weighed * q;
      values[j].lanes[part] = q;
      errors[j].lanes[part] = group.weights[j].lanes[part] - value;
    }
  }
  Trial trial{loss, scale.scale};
  for (int part = 0; part < kRowLanes; ++part) {
    const Lanes square = squares.lanes[part];
    trial.refit.lanes[part] =
        square > Lanes{} ? max(products.lanes[part] / square, Lanes{}) : scale.scale.lanes[part];
  }
  return trial;
}

void select(const IntLanes& better, Lanes& kept, const Lanes& other) noexcept {
  kept = better ? other : kept;
}

// What the search remembers: the best scale, its loss, and what it would rather have been.
class Best {
 public:
  explicit Best(const WeightedGroup& group) {
    for (std::size_t j = 0; j < group.count; ++j) {
      const Lanes importance = lanes(group.importance[j]);
      for (int part = 0; part < kRowLanes; ++part) {
        const Lanes target = group.targets[j].lanes[part];
        loss_.lanes[part] += importance * target * target;
      }
    }
  }

  void offer(const GroupScale& scale, const Trial& trial) noexcept {
    for (int part = 0; part < kRowLanes; ++part) {
      const IntLanes better = trial.loss.lanes[part] < loss_.lanes[part];
      select(better, loss_.lanes[part], trial.loss.lanes[part]);
      select(better, refit_.lanes[part], trial.refit.lanes[part]);
      select(better, scale_.scale.lanes[part], scale.scale.lanes[part]);
      select(better, scale_.inverse.lanes[part], scale.inverse.lanes[part]);
      select(better, scale_.zero.lanes[part], scale.zero.lanes[part]);
      select(better, scale_.lowest.lanes[part], scale.lowest.lanes[part]);
      select(better, scale_.highest.lanes[part], scale.highest.lanes[part]);
    }
  }

  const GroupScale& scale() const noexcept { return scale_; }
  const Rows& refit() const noexcept { return refit_; }

 private:
  GroupScale scale_{};  // nothing at all
  Rows loss_{};
  Rows refit_{};
};

struct Range {
  Rows low{}, high{};  // with 0 in between
  explicit Range(const WeightedGroup& group) {
    for (std::size_t j = 0; j < group.count; ++j) {
      for (int part = 0; part < kRowLanes; ++part) {
        low.lanes[part] = min(low.lanes[part], group.targets[j].lanes[part]);
        high.lanes[part] = max(high.lanes[part], group.targets[j].lanes[part]);
      }
    }
  }
};

template <class Levels>
class Search {
 public:
  Search(const Format& format, const WeightedGroup& group, const Rows* unit, Rows* values, Rows* errors)
      : format_(format),
        group_(group),
        unit_(unit),
        values_(values),
        errors_(errors),
        range_(group),
        best_(group) {}

  GroupScale run() noexcept {
    const Grid candidates = grid(format_);
    for (int offset = -candidates.reach; offset <= candidates.reach; ++offset) {
      const GroupScale whole = covering(static_cast<float>(offset));
      for (int i = 0; i < candidates.count; ++i) {
        const float ratio = candidates.first - candidates.step * static_cast<float>(i);
        Rows scale;
        for (int part = 0; part < kRowLanes; ++part)
          scale.lanes[part] = whole.scale.lanes[part] * lanes(ratio);
        consider(scale, whole);
      }
    }
    for (int i = 0; i < kRefinements; ++i) {
      const Rows refit = best_.refit();
      const GroupScale like = best_.scale();
      consider(refit, like);
    }
    attempt<Levels>(group_, best_.scale(), values_, errors_);
    return best_.scale();
  }

 private:
  void consider(const Rows& scale, GroupScale candidate) noexcept {
    for (int part = 0; part < kRowLanes; ++part) {
      const Lanes stored = storable(scale.lanes[part], unit_, part);
      candidate.scale.lanes[part] = stored;
      candidate.inverse.lanes[part] = stored > Lanes{} ? lanes(1.0F) / stored : Lanes{};
    }
    best_.offer(candidate, attempt<Levels>(group_, candidate, values_, errors_));
  }

  // The scale that covers the range, with the zero of the range moved by `offset`.
  GroupScale covering(float offset) const noexcept {
    GroupScale whole{};
    const Lanes largest = lanes(static_cast<float>((1 << format_.bits) - 1));
    for (int part = 0; part < kRowLanes; ++part) {
      const Lanes low = range_.low.lanes[part], high = range_.high.lanes[part];
      Lanes& scale = whole.scale.lanes[part];
      if (format_.codebook != Codebook::none) {
        scale = max(high, -low) / lanes(largest_value(format_));
        continue;
      }
      Lanes zero = lanes(static_cast<float>(1 << (format_.bits - 1)));
      Lanes lowest = lanes(1.0F) - zero;  // without a zero, code 0 stays unused
      if (format_.zero != ZeroType::none) {
        const Lanes width = high - low;
        zero = round(width > Lanes{} ? -low * largest / width : Lanes{}) + lanes(offset);
        zero = clamp(zero, Lanes{}, largest);
        lowest = -zero;
      }
      whole.zero.lanes[part] = zero;
      whole.lowest.lanes[part] = lowest;
      whole.highest.lanes[part] = largest - zero;
      scale = max(high / max(largest - zero, lanes(0.5F)), low / min(lowest, lanes(-0.5F)));
    }
    return whole;
  }

  const Format& format_;
  const WeightedGroup& group_;
  const Rows* unit_;
  Rows* values_;
  Rows* errors_;
  Range range_;
  Best best_;
};

}  // namespace

Lanes nearest_value(const Format& format, const GroupScale& scale, int part, Lanes weight) noexcept {
  return with_levels(format.codebook, [&]<class Levels>(Levels) {
    return Levels::nearest(scale, part, weight * scale.inverse.lanes[part]);
  });
}

GroupScale fit_weighted(const Format& format, const WeightedGroup& group, const Rows* unit, Rows* values,
                        Rows* errors) noexcept {
  return with_levels(format.codebook, [&]<class Levels>(Levels) {
    return Search<Levels>(format, group, unit, values, errors).run();
  });
}

Rows block_unit(const Format& format, const Rows& largest) noexcept {
  const Lanes steps = lanes(largest_value(format) * kLargestInteger);
  Rows unit;
  for (int part = 0; part < kRowLanes; ++part) {
    const Lanes magnitude = largest.lanes[part];
    unit.lanes[part] = magnitude > Lanes{} ? to_half(magnitude / steps) : Lanes{};
  }
  return unit;
}

}  // namespace edgert
