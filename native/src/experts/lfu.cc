// Least frequently used. Ageing: a row's counts are halved after every kHalving visits, absent experts' too,
// so that what was in demand long ago makes place.
#include "experts/ranked.h"

namespace edgert {
namespace {

constexpr int kHalving = 64;

class Lfu final : public RankedPolicy {
 public:
  explicit Lfu(std::span<const int> rows) : RankedPolicy(rows), visits_(rows.size(), 0) {}

  void visited(int row, std::span<const int> experts, bool scan) override {
    if (scan) return;
    const int first = first_entry(row);
    if (++visits_[static_cast<std::size_t>(row)] % kHalving == 0) {
      for (int i = 0; i < row_size(row); ++i) set_value(first + i, value(first + i) / 2);
    }
    for (const int expert : experts) set_value(first + expert, value(first + expert) + 1);
  }

 private:
  std::vector<int> visits_;
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_lfu(std::span<const int> rows) { return std::make_unique<Lfu>(rows); }

}  // namespace edgert
