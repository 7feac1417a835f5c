// EdgeMoE's statistical dictionary (arXiv 2308.14352), whose key is the active experts of the two layers
// before. With eight experts a token no key comes twice, so each expert of them adds its own share to the
// score:
//   score_n(j) = b_n[j] + sum over i active at n-1 of T1_n[i, j] + sum over i active at n-2 of T2_n[i, j]
#include <algorithm>

#include "experts/predictor.h"
#include "quant/pack.h"

namespace edgert {
namespace {

class Dictionary final : public Predictor {
 public:
  explicit Dictionary(const RoutingProfile& profile) : profile_(profile) {}

  void score(const Sight& sight, std::span<float> scores) override {
    const int row = sight.row + 1;
    const auto base = profile_.base(row);
    std::copy(base.begin(), base.end(), scores.begin());
    add(row, 1, sight.experts, scores);
    if (row >= 2) add(row, 2, before_, scores);
    before_.assign(sight.experts.begin(), sight.experts.end());
  }

 private:
  void add(int row, int distance, std::span<const std::int32_t> active, std::span<float> scores) const {
    for (const std::int32_t expert : active) {
      const auto addend = profile_.addend(row, distance, expert);
      for (std::size_t j = 0; j < scores.size(); ++j) scores[j] += half_to_float(addend[j]);
    }
  }

  const RoutingProfile& profile_;
  std::vector<std::int32_t> before_;  // active at the row before the one that has spoken
};

}  // namespace

std::unique_ptr<Predictor> make_dictionary(const PredictorSources& sources) {
  return std::make_unique<Dictionary>(*sources.profile);
}

}  // namespace edgert
