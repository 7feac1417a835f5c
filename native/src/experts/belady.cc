// Belady's optimum, which knows what will be asked for: what is needed again last goes. Where experts weigh
// the same no policy reads less. Where they do not, the order stays the same and the best choice would be a
// knapsack's: then it is an approximation from above of what must be read.
#include <map>

#include "experts/ranked.h"
#include "experts/simulation.h"
#include "platform/error.h"

namespace edgert {
namespace {

class Belady final : public RankedPolicy {
 public:
  Belady(std::span<const int> rows, const std::vector<RoutedStep>& future) : RankedPolicy(rows) {
    for (const RoutedStep& step : future) end_ += static_cast<int>(step.size());
    std::map<int, int> next;  // visit by entry
    int visit = end_;
    for (auto step = future.rbegin(); step != future.rend(); ++step) {
      for (int row = static_cast<int>(step->size()); row-- > 0;) {
        --visit;
        std::vector<int> visits;
        for (const int expert : (*step)[static_cast<std::size_t>(row)]) {
          const auto [found, fresh] = next.try_emplace(first_entry(row) + expert, end_);
          visits.push_back(found->second);
          found->second = visit;
        }
        next_uses_.push_back(std::move(visits));
      }
    }
  }

  void visited(int row, std::span<const int> experts, bool) override {
    if (next_uses_.empty() || next_uses_.back().size() != experts.size()) {
      throw Error(ErrorKind::invalid_argument, "future: found other steps than those that run");
    }
    for (std::size_t i = 0; i < experts.size(); ++i) {
      set_value(first_entry(row) + experts[i], end_ - next_uses_.back()[i]);
    }
    next_uses_.pop_back();
  }

  void passed(int entry) override { used(entry); }

 private:
  int end_ = 0;                              // the number of visits
  std::vector<std::vector<int>> next_uses_;  // of each visit's experts, the first visit last
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_belady(std::span<const int> rows,
                                            const std::vector<RoutedStep>& future) {
  return std::make_unique<Belady>(rows, future);
}

}  // namespace edgert
