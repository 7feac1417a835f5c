// EdgeMoE's policy (arXiv 2308.14352): what goes has the least f / d, where f is how often an expert was used
// and d how many layers run until its own does again. The formula that is printed there evicts the next
// layer's first and divides by zero; this is what its text says: d = ((i - I - 1) mod S) + 1 for layer i of S
// when I runs.
#include "experts/ranked.h"

namespace edgert {
namespace {

class EdgeMoe final : public RankedPolicy {
 public:
  explicit EdgeMoe(std::span<const int> rows) : RankedPolicy(rows) {}

  void visited(int row, std::span<const int> experts, bool scan) override {
    running_ = row;
    if (scan) return;
    const int first = first_entry(row);
    for (const int expert : experts) set_value(first + expert, value(first + expert) + 1);
  }

 private:
  double weight(int row) const override { return 1.0 / distance(row, running_, row_count()); }

  int running_ = 0;
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_edgemoe(std::span<const int> rows) {
  return std::make_unique<EdgeMoe>(rows);
}

}  // namespace edgert
