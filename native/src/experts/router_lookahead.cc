// The next row's own router, applied to the residual stream as it stands: what the layers between will add to
// it is small against what is there.
#include "experts/predictor.h"

namespace edgert {
namespace {

class RouterLookahead final : public Predictor {
 public:
  explicit RouterLookahead(const PredictorSources& sources)
      : routers_(sources.routers),
        kernels_(*sources.kernels),
        pool_(*sources.pool),
        normed_(static_cast<std::size_t>(sources.hidden)) {}

  void score(const Sight& sight, std::span<float> scores) override {
    const RowRouter& router = routers_[static_cast<std::size_t>(sight.row) + 1];
    if (router.layer_norm) {
      kernels_.layer_norm(sight.residual, router.norm, router.norm_bias, normed_.size(), router.norm_eps,
                          normed_.data());
    } else {
      kernels_.rms_norm(sight.residual, router.norm, normed_.size(), router.norm_eps, normed_.data());
    }
    MatMul work;
    work.format = FormatId::f32;
    work.weights = router.weights;
    work.rows = scores.size();
    work.cols = normed_.size();
    work.x = normed_.data();
    work.x_stride = normed_.size();
    work.m = 1;
    work.bias = router.bias;
    work.y = scores.data();
    work.y_stride = scores.size();
    multiply_row(work, pool_, kernels_);
    apply_selection(router, kernels_, scores);
  }

 private:
  const std::vector<RowRouter> routers_;
  const KernelTable& kernels_;
  ThreadPool& pool_;
  std::vector<float> normed_;
};

}  // namespace

std::unique_ptr<Predictor> make_router_lookahead(const PredictorSources& sources) {
  return std::make_unique<RouterLookahead>(sources);
}

}  // namespace edgert
