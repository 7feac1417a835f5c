#include "quant/search.h"

namespace edgert {

namespace {

constexpr float kHalfMax = 65504.0F;
constexpr float kHalfTiny = 0x1p-24F;  // the smallest positive half

// Candidates: the range of the group shrunk by each ratio, with zeros up to `reach` around the range's own.
struct Grid {
  float first;
  float step;
  int count;
  int reach;
};

constexpr Grid grid(int bits) noexcept {
  switch (bits) {
    case 2:
      return {1.0F, -0.09F, 8, 3};
    case 3:
      return {1.0F, -0.06F, 8, 2};
    case 4:
      return {1.0F, -0.05F, 7, 1};
    default:
      return {1.0F, -0.01F, 3, 0};
  }
}

// Positive scales to the nearest half: Veltkamp's splitting keeps 11 bits; below 2^-14 the steps are 2^-24.
Lanes to_half(Lanes scale) {
  const Lanes split = scale * lanes(0x1p13F + 1.0F);
  const Lanes normal = split - (split - scale);
  const Lanes subnormal = (scale + lanes(0.5F)) - lanes(0.5F);
  return clamp(scale < lanes(0x1p-14F) ? subnormal : normal, lanes(kHalfTiny), lanes(kHalfMax));
}

GroupFit make_fit(const Format& format, Lanes scale, Lanes zero) {
  const float codes = static_cast<float>((1 << format.bits) - 1);
  const Lanes half = to_half(scale);
  // Without a zero, code 0 stays unused: the range is symmetric.
  const Lanes lowest = format.zero == ZeroType::none ? lanes(1.0F) - zero : -zero;
  return {half, lanes(1.0F) / half, zero, lowest, lanes(codes) - zero};
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

void take_better(GroupFit& best, Lanes& best_error, const GroupFit& fit, Lanes error) {
  const IntLanes better = error < best_error;
  best_error = better ? error : best_error;
  best.scale = better ? fit.scale : best.scale;
  best.inverse = better ? fit.inverse : best.inverse;
  best.zero = better ? fit.zero : best.zero;
  best.lowest = better ? fit.lowest : best.lowest;
  best.highest = better ? fit.highest : best.highest;
}

}  // namespace

float largest_weight(const Format& format) noexcept {
  // Half of the codes serve each sign at worst.
  return kHalfMax * static_cast<float>((1 << (format.bits - 1)) - 1);
}

GroupFit fit_group(const Format& format, const GroupWeights& weights) noexcept {
  Lanes low{}, high{};
  for (const Lanes weight : weights) {
    low = min(low, weight);
    high = max(high, weight);
  }
  const bool symmetric = format.zero == ZeroType::none;
  const float codes = static_cast<float>((1 << format.bits) - 1);
  const Lanes span = symmetric ? max(high, -low) * lanes(2.0F) : high - low;
  const Lanes full = max(span / lanes(symmetric ? codes - 1.0F : codes), lanes(kHalfTiny));
  const Lanes middle = symmetric ? lanes(static_cast<float>(1 << (format.bits - 1))) : round(-low / full);

  const GroupFit plain = make_fit(format, full, middle);
  GroupFit best = plain;
  Lanes best_error = measure(plain, weights).error;

  Lanes start_scale = plain.scale, start_zero = middle, start_error = best_error;
  const Grid candidates = grid(format.bits);
  for (int offset = -candidates.reach; offset <= candidates.reach; ++offset) {
    const Lanes zero =
        symmetric ? middle : clamp(middle + lanes(static_cast<float>(offset)), Lanes{}, lanes(codes));
    const Lanes below = symmetric ? lanes((codes - 1.0F) / 2) : max(zero, lanes(0.5F));
    const Lanes above = symmetric ? below : max(lanes(codes) - zero, lanes(0.5F));
    const Lanes cover = max(high / above, -low / below);
    for (int i = 0; i < candidates.count; ++i) {
      const float ratio = candidates.first + candidates.step * static_cast<float>(i);
      const Measure m = measure(make_fit(format, cover * lanes(ratio), zero), weights);
      const IntLanes better = m.refit_error < start_error;
      start_error = better ? m.refit_error : start_error;
      start_scale = better ? m.refit_scale : start_scale;
      start_zero = better ? zero : start_zero;
    }
  }
  for (int i = 0; i < 2; ++i) {
    const GroupFit fit = make_fit(format, start_scale, start_zero);
    const Measure m = measure(fit, weights);
    take_better(best, best_error, fit, m.error);
    start_scale = m.refit_scale;
  }

  const IntLanes empty = span == Lanes{};
  best.scale = empty ? Lanes{} : best.scale;
  best.inverse = empty ? Lanes{} : best.inverse;
  return best;
}

}  // namespace edgert
