// A linear map for every row and the next, fitted during calibration, from what the earlier row's router read
// to the later one's logits: that router itself, corrected by what the layers between do on average.
#include "experts/predictor.h"

namespace edgert {
namespace {

class TrainedLookahead final : public Predictor {
 public:
  explicit TrainedLookahead(const PredictorSources& sources)
      : profile_(*sources.profile),
        routers_(sources.routers),
        kernels_(*sources.kernels),
        pool_(*sources.pool),
        hidden_(static_cast<std::size_t>(sources.hidden)),
        padded_(round_up(hidden_, kMaxGroup)),
        codes_(padded_),
        scales_(padded_ / kActivationGroup),
        sums_(padded_ / kActivationGroup) {}

  void score(const Sight& sight, std::span<float> scores) override {
    const int row = sight.row + 1;
    kernels_.quantize(sight.router_input, hidden_, padded_, codes_.data(), scales_.data(), sums_.data());
    MatMul work;
    work.format = FormatId::int8;
    work.weights = profile_.matrix(row).data();
    work.rows = scores.size();
    work.cols = hidden_;
    work.quantized = {codes_.data(), scales_.data(), sums_.data(), padded_};
    work.m = 1;
    work.bias = profile_.shift(row).data();
    work.y = scores.data();
    work.y_stride = scores.size();
    multiply_row(work, pool_, kernels_);
    apply_selection(routers_[static_cast<std::size_t>(row)], kernels_, scores);
  }

 private:
  const RoutingProfile& profile_;
  const std::vector<RowRouter> routers_;
  const KernelTable& kernels_;
  ThreadPool& pool_;
  const std::size_t hidden_;
  const std::size_t padded_;
  std::vector<std::int8_t> codes_;  // of the router's input, as integer products want it
  std::vector<float> scales_;
  std::vector<GroupSum> sums_;
};

}  // namespace

std::unique_ptr<Predictor> make_trained_lookahead(const PredictorSources& sources) {
  return std::make_unique<TrainedLookahead>(sources);
}

}  // namespace edgert
