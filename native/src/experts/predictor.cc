#include "experts/predictor.h"

#include <cmath>
#include <string>

#include "platform/error.h"

namespace edgert {

Prediction prediction(std::string_view word) {
  std::string known;
  for (std::size_t i = 0; i < std::size(kPredictions); ++i) {
    if (kPredictions[i] == word) return static_cast<Prediction>(i);
    known.append(known.empty() ? "" : ", ").append(kPredictions[i]);
  }
  throw Error(ErrorKind::invalid_argument, "prefetch: found '" + std::string(word) + "', allowed " + known);
}

void multiply_row(const MatMul& work, ThreadPool& pool, const KernelTable& kernels) {
  const std::size_t tiles = (work.rows + kTileRows - 1) / kTileRows;
  pool.run(static_cast<int>(tiles), 0, [&](int begin, int end, int) {
    kernels.matmul(work, static_cast<std::size_t>(begin), static_cast<std::size_t>(end));
  });
}

void apply_selection(const RowRouter& router, const KernelTable& kernels, std::span<float> logits) {
  if (router.selection_bias == nullptr) return;  // scoring keeps the order
  if (router.sigmoid) {
    for (float& logit : logits) logit = 1 / (1 + std::exp(-logit));
  } else {
    kernels.softmax(logits.data(), logits.size());
  }
  for (std::size_t e = 0; e < logits.size(); ++e) logits[e] += router.selection_bias[e];
}

}  // namespace edgert
