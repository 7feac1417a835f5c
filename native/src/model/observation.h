// Measures a model as it runs: which experts are used together, and second moments of the inputs of matrices.
//
// Counts are exact. Moments do not depend on the number of threads or the budget; steps of other sizes round
// them apart by some 1e-6 of the root of the product of their diagonals.
//
// Steps are taken in whatever number of rows; a token follows another one of its sequence where that one
// stands in the same step, or last in the step before. A step that fails leaves part of its rows counted.
//
// Threads: called by the thread that runs the step; what it measured is read between steps.
// Ownership: borrows recipe and machine; its sums and its scratch memory are charged to the budget.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "model/decoder.h"
#include "model/observer.h"
#include "model/outer_sums.h"
#include "model/recipe.h"

namespace edgert {

// full: of every input the whole matrix of second moments. diagonal: only its diagonal. automatic: whole
// matrices for as many kinds of inputs as fit Observation::kAutomaticBytes: those of routed experts one by
// one are given up first, then those of dense matrices that routed experts do not share.
enum class MomentsKind { none, diagonal, full, automatic };
MomentsKind moments(const std::string& word);  // Error{invalid_argument} names those allowed

class Observation final : public Observer {
 public:
  static constexpr std::uint64_t kAutomaticBytes = std::uint64_t{1} << 30;

  static std::uint64_t sums_bytes(const Recipe& recipe, MomentsKind moments);
  static std::uint64_t scratch_bytes(const Recipe& recipe, MomentsKind moments, int rows, int threads);
  // For steps of at most `rows`. REQUIRES moments other than none.
  Observation(const Recipe& recipe, MomentsKind moments, Machine machine, std::shared_ptr<Budget> budget,
              int rows);

  void begin(std::span<const BatchRow> rows) override;
  void input(int layer, Site site, const ObservedRows& rows) override;
  void router(int layer, const ObservedRows& x, const float* logits) override;
  void routed(int layer, const std::int32_t* experts, const float* weights) override;
  void experts(int layer, Site site, std::span<const ObservedExpert> groups) override;

  // One array as docs/calibration.md names it: counts and sums as they are, means of `values` over `counts`,
  // the first values over the first count and so on.
  struct Statistic {
    std::string name;
    std::vector<std::size_t> shape;
    std::span<const std::int64_t> counts;
    std::span<const double> values;  // none: the counts themselves
    bool mean = false;
  };
  std::vector<Statistic> statistics() const;
  std::int64_t tokens() const noexcept { return *tokens_; }

 private:
  struct Inputs {  // of a site
    int layer;
    Site site;
    std::size_t sets;  // experts, else 1
    std::size_t length;
    bool full;
    std::span<std::int64_t> counts;  // rows, by set
    std::span<double> sums;          // [sets][a triangle, or a diagonal]
    std::size_t size() const { return full ? triangle_size(length) : length; }
  };
  struct Routing {  // of an MoE layer
    int layer;
    std::size_t experts, top;
    std::span<std::int64_t> tokens, token_before, before[2];
    std::span<double> weight, weight_squared, mean, logits, cross[2];
    std::span<std::int32_t> last;    // experts of the last row of the step before
    std::span<std::int32_t> chosen;  // of this step's rows
  };
  struct Layout {
    std::int64_t* tokens = nullptr;
    std::vector<Inputs> inputs;
    std::vector<Routing> routing;
    std::size_t bytes = 0;
    std::size_t longest = 0;  // of the vectors that outer products are taken of
  };
  struct Whole {  // whether whole matrices are summed, by kind of input
    bool single_experts, dense, moe;
  };
  static Whole whole(const Recipe& recipe, MomentsKind moments);
  static Layout layout(const Recipe& recipe, Whole whole, std::byte* base);
  Inputs& inputs(int layer, Site site);
  std::size_t moe_index(int layer) const { return moe_[static_cast<std::size_t>(layer)]; }
  void add(const Inputs& inputs, std::span<const OuterSums::Work> work);
  static void count_pairs(std::span<const std::int32_t> before, std::span<const std::int32_t> now,
                          std::size_t experts, std::span<std::int64_t> counts);

  const Recipe& recipe_;
  OuterSums sums_;
  Buffer memory_;   // of the sums
  Buffer scratch_;  // of the rows of a step
  std::int64_t* tokens_ = nullptr;
  std::vector<Inputs> inputs_;
  std::vector<Routing> routing_;
  std::vector<std::size_t> moe_;  // by layer
  std::size_t rows_ = 0;          // of the step
  std::vector<bool> follows_;     // whether a row follows the one before it; the first one, the last step's
  const void* last_sequence_ = nullptr;
  std::int64_t last_position_ = -1;
  float* x_[2] = {};  // [rows][hidden], what the routers of the last two MoE layers read
};

}  // namespace edgert
