#include "quant/search.h"

#include <algorithm>

namespace edgert {

namespace {

constexpr float kHalfMax = 65504.0F;
constexpr float kHalfTiny = 0x1p-24F;  // the smallest positive half
constexpr int kRefinements = 2;        // of the scale after the grid; more change nothing that matters

// Candidates: zeros up to `reach` around that of the group's range, each with the scale that covers the range
// shrunk by `count` ratios. Chosen so that the error is within 0.2 % of that of a grid ten times as dense.
struct Grid {
  float step;
  int count;
  int reach;
};

constexpr Grid grid(const Format& format) noexcept {
  const int reach = format.zero == ZeroType::none ? 0 : 1;
  switch (format.bits) {
    case 2:
      return {0.10F, 7, 2 * reach};
    case 3:
      return {0.06F, 8, 2 * reach};
    case 4:
      return {0.05F, 7, reach};
    default:
      return {0.01F, 3, 0};
  }
}

float largest_code(const Format& format) { return static_cast<float>((1 << format.bits) - 1); }

GroupFit make_fit(const Format& format, Lanes scale, Lanes zero) {
  const Lanes half = to_half(scale);
  // Without a zero, code 0 stays unused: the range is symmetric.
  const Lanes lowest = format.zero == ZeroType::none ? lanes(1.0F) - zero : -zero;
  return {half, lanes(1.0F) / half, zero, lowest, lanes(largest_code(format)) - zero};
}

struct Measure {
  Lanes error;        // squared, as the fit stands
  Lanes refit_error;  // squared, with the codes as they are and the best scale for them
  Lanes refit_scale;
};

Measure measure(const GroupFit& fit, const GroupWeights& weights) {
  Lanes ee{}, eq{}, qq{};
  for (const Lanes weight : weights) {
    const Lanes exact = weight * fit.inverse;
    const Lanes q = round(clamp(exact, fit.lowest, fit.highest));
    const Lanes e = exact - q;
    ee += e * e;
    eq += e * q;
    qq += q * q;
  }
  const Lanes change = eq / max(qq, lanes(1.0F));  // all codes zero: no change
  const Lanes unit = fit.scale * fit.scale;
  return {unit * ee, unit * (ee - change * eq), fit.scale + fit.scale * change};
}

struct Choice {
  Lanes scale, zero, error;
  void offer(Lanes other_scale, Lanes other_zero, Lanes other_error) {
    const IntLanes better = other_error < error;
    scale = better ? other_scale : scale;
    zero = better ? other_zero : zero;
    error = better ? other_error : error;
  }
};

// The best of the grid, each candidate judged by its codes with the best scale for them.
Choice search_grid(const Format& format, const GroupWeights& weights, Lanes low, Lanes high, Choice best) {
  const Grid candidates = grid(format);
  const Lanes middle = best.zero;
  for (int offset = -candidates.reach; offset <= candidates.reach; ++offset) {
    const Lanes zero =
        clamp(middle + lanes(static_cast<float>(offset)), Lanes{}, lanes(largest_code(format)));
    const GroupFit unit = make_fit(format, lanes(1.0F), zero);
    const Lanes cover = max(high / max(unit.highest, lanes(0.5F)), low / min(unit.lowest, lanes(-0.5F)));
    for (int i = 0; i < candidates.count; ++i) {
      const Lanes ratio = lanes(1.0F - candidates.step * static_cast<float>(i));
      const Measure m = measure(make_fit(format, cover * ratio, zero), weights);
      best.offer(m.refit_scale, zero, m.refit_error);
    }
  }
  return best;
}

}  // namespace

// Veltkamp's splitting keeps 11 bits; below 2^-14 the steps are 2^-24.
Lanes to_half(Lanes scale) noexcept {
  const Lanes split = scale * lanes(0x1p13F + 1.0F);
  const Lanes normal = split - (split - scale);
  const Lanes subnormal = (scale + lanes(0.5F)) - lanes(0.5F);
  return clamp(scale < lanes(0x1p-14F) ? subnormal : normal, lanes(kHalfTiny), lanes(kHalfMax));
}

float largest_weight(const Format& format) noexcept {
  if (format.codebook != Codebook::none) {
    const CodebookValues values = codebook_values(format.codebook);
    return kHalfMax * static_cast<float>(*std::max_element(values.begin(), values.end()));
  }
  // Half of the codes serve each sign at worst.
  return kHalfMax * static_cast<float>((1 << (format.bits - 1)) - 1);
}

GroupFit fit_group(const Format& format, const GroupWeights& weights) noexcept {
  Lanes low{}, high{};
  for (const Lanes weight : weights) {
    low = min(low, weight);
    high = max(high, weight);
  }
  Lanes codes = lanes(largest_code(format));
  Lanes zero = lanes(static_cast<float>(1 << (format.bits - 1)));
  if (format.zero == ZeroType::none) {
    high = max(high, -low);
    low = -high;
    codes -= lanes(1.0F);
  }
  const Lanes range_scale = max((high - low) / codes, lanes(kHalfTiny));
  if (format.zero != ZeroType::none) zero = round(-low / range_scale);

  const GroupFit plain = make_fit(format, range_scale, zero);
  Choice best{plain.scale, plain.zero, measure(plain, weights).error};
  Choice start = search_grid(format, weights, low, high, best);
  for (int i = 0; i < kRefinements; ++i) {
    const GroupFit fit = make_fit(format, start.scale, start.zero);
    const Measure m = measure(fit, weights);
    best.offer(fit.scale, fit.zero, m.error);
    start.scale = m.refit_scale;
  }

  GroupFit fit = make_fit(format, best.scale, best.zero);
  const IntLanes empty = low == high;  // both are 0
  fit.scale = empty ? Lanes{} : fit.scale;
  fit.inverse = empty ? Lanes{} : fit.inverse;
  return fit;
}

}  // namespace edgert
