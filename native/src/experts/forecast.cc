// Keeps what is likely to be used at its row's next visit.
//
// The likelihood is a weighted sum of what is known of an expert: its use averaged over the last visits with
// several memories, from the last visit alone to about a hundred (recency and frequency), and how often it
// followed the experts of the last visit (a table of successors, filled as the model runs). The weights are
// those that would have foretold the recent visits best: least squares over every expert of every row, with
// older visits fading, solved again each time the rows begin anew. So a model, a text and a change of subject
// find their own balance. What a predictor says of a row is one more term until it is visited, with weights
// found in the same way.
//
// Of equal likelihoods the one that could be used first stays: a row that has just run counts half as much as
// the one that runs next.
#include <algorithm>
#include <array>
#include <cmath>

#include "experts/ranked.h"

namespace edgert {
namespace {

constexpr std::array kMemories = {0.0, 0.5, 0.8, 0.95, 0.99};
constexpr std::size_t kAverages = kMemories.size();
constexpr std::size_t kTerms = kAverages + 1;  // and the successors
constexpr std::size_t kForeseen = kTerms + 1;  // and a predictor's word
constexpr double kFading = 0.995;              // of older errors, a pass over the rows
constexpr double kRidge = 50;                  // that holds the weights to equal averages
constexpr double kFarthest = 0.5;              // what the row that ran last counts for
constexpr float kShrinkage = 8;                // visits for which a successor's general frequency stands in
constexpr std::uint8_t kFull = 255;            // counts of successors are halved there

template <std::size_t Count>
using Vector = std::array<double, Count>;
using Terms = std::array<float, kForeseen>;  // the last one while it is foreseen

std::size_t at(int index) { return static_cast<std::size_t>(index); }

// Equal averages; a predictor is believed.
template <std::size_t Count>
Vector<Count> first_weights() {
  Vector<Count> weights{};
  if constexpr (Count == kForeseen) {
    weights[kTerms] = 1;
  } else {
    std::fill_n(weights.begin(), kAverages, 1.0 / kAverages);
  }
  return weights;
}

// Weights of the first `Count` terms, by least squares from sums over what was seen.
template <std::size_t Count>
class Fit {
 public:
  void add(const Terms& terms, bool used) noexcept {
    for (std::size_t i = 0; i < Count; ++i) {
      for (std::size_t j = 0; j <= i; ++j) products_[i][j] += static_cast<double>(terms[i]) * terms[j];
      if (used) uses_[i] += terms[i];
    }
  }

  void fade() noexcept {
    for (std::size_t i = 0; i < Count; ++i) {
      for (std::size_t j = 0; j <= i; ++j) products_[i][j] *= kFading;
      uses_[i] *= kFading;
    }
  }

  Vector<Count> solve() const noexcept {  // by Cholesky's method; the ridge keeps the matrix definite
    std::array<Vector<Count>, Count> root{};
    Vector<Count> x = first_weights<Count>();
    for (std::size_t i = 0; i < Count; ++i) {
      x[i] = kRidge * x[i] + uses_[i];
      for (std::size_t j = 0; j <= i; ++j) {
        double sum = products_[i][j] + (i == j ? kRidge : 0);
        for (std::size_t k = 0; k < j; ++k) sum -= root[i][k] * root[j][k];
        root[i][j] = i == j ? std::sqrt(sum) : sum / root[j][j];
      }
    }
    for (std::size_t i = 0; i < Count; ++i) {
      for (std::size_t k = 0; k < i; ++k) x[i] -= root[i][k] * x[k];
      x[i] /= root[i][i];
    }
    for (std::size_t i = Count; i-- > 0;) {
      for (std::size_t k = i + 1; k < Count; ++k) x[i] -= root[k][i] * x[k];
      x[i] /= root[i][i];
    }
    return x;
  }

 private:
  std::array<Vector<Count>, Count> products_{};  // the lower half
  Vector<Count> uses_{};
};

// What is known of a row's experts.
class Outlook {
 public:
  explicit Outlook(int experts)
      : terms_(at(experts)), used_(at(experts)), visits_(at(experts)), followed_(at(experts) * at(experts)) {
    last_.reserve(at(experts));
  }

  void visited(std::span<const int> experts, Fit<kTerms>& fit, Fit<kForeseen>& foreseen_fit) {
    std::fill(used_.begin(), used_.end(), std::uint8_t{0});
    for (const int expert : experts) used_[at(expert)] = 1;
    if (!last_.empty()) {
      for (std::size_t e = 0; e < terms_.size(); ++e) fit.add(terms_[e], used_[e] != 0);
      if (foreseen_) {
        for (std::size_t e = 0; e < terms_.size(); ++e) foreseen_fit.add(terms_[e], used_[e] != 0);
      }
    }
    foreseen_ = false;
    for (const int before : last_) follow(before, experts);
    last_.assign(experts.begin(), experts.end());
    for (std::size_t e = 0; e < terms_.size(); ++e) {
      for (std::size_t i = 0; i < kAverages; ++i) {
        const auto memory = static_cast<float>(kMemories[i]);
        terms_[e][i] = memory * terms_[e][i] + (1 - memory) * static_cast<float>(used_[e]);
      }
    }
    expect_successors();
  }

  void foresee(std::span<const float> probabilities) noexcept {
    for (std::size_t e = 0; e < probabilities.size(); ++e) terms_[e][kTerms] = probabilities[e];
    foreseen_ = true;
  }
  void forget() noexcept { foreseen_ = false; }

  template <std::size_t Count>
  double likelihood(int expert, const Vector<Count>& weights) const noexcept {
    double sum = 0;
    for (std::size_t i = 0; i < Count; ++i) sum += weights[i] * terms_[at(expert)][i];
    return std::max(sum, 0.0);
  }

  static std::uint64_t bytes(int experts) noexcept {
    return sizeof(Outlook) + at(experts) * (sizeof(Terms) + 2 + sizeof(int) + at(experts));
  }

 private:
  std::uint8_t* successors(int expert) { return followed_.data() + at(expert) * terms_.size(); }

  void follow(int before, std::span<const int> experts) {
    std::uint8_t* counts = successors(before);
    if (visits_[at(before)] == kFull) {
      visits_[at(before)] /= 2;
      for (std::size_t e = 0; e < terms_.size(); ++e) counts[e] /= 2;
    }
    ++visits_[at(before)];
    for (const int expert : experts) ++counts[expert];
  }

  // The share of visits in which each expert followed one of the last, averaged over those.
  void expect_successors() {
    constexpr std::size_t kLongest = kAverages - 1;
    float total = 0;
    for (Terms& terms : terms_) {
      total += terms[kLongest];
      terms[kAverages] = 0;
    }
    const auto chosen = static_cast<float>(last_.size());
    for (const int before : last_) {
      const std::uint8_t* counts = successors(before);
      const float share = 1 / (chosen * (static_cast<float>(visits_[at(before)]) + kShrinkage));
      const float general = kShrinkage * chosen / total;
      for (std::size_t e = 0; e < terms_.size(); ++e) {
        terms_[e][kAverages] += share * (static_cast<float>(counts[e]) + general * terms_[e][kLongest]);
      }
    }
  }

  std::vector<Terms> terms_;
  std::vector<std::uint8_t> used_;  // by the visit under way
  bool foreseen_ = false;
  std::vector<std::uint8_t> visits_;
  std::vector<std::uint8_t> followed_;  // [before][after]
  std::vector<int> last_;               // the last visit's experts
};

class Forecast final : public RankedPolicy {
 public:
  explicit Forecast(std::span<const int> rows) : RankedPolicy(rows) {
    for (const int count : rows) outlooks_.emplace_back(count);
  }

  void visited(int row, std::span<const int> experts, bool scan) override {
    const bool anew = row <= running_;
    running_ = row;
    Outlook& outlook = outlooks_[at(row)];
    if (scan) return outlook.forget();
    if (anew) {
      fit_.fade();
      weights_ = fit_.solve();
      foreseen_fit_.fade();
      foreseen_weights_ = foreseen_fit_.solve();
    }
    outlook.visited(experts, fit_, foreseen_fit_);
    for (int e = 0; e < row_size(row); ++e) {
      set_value(first_entry(row) + e, outlook.likelihood(e, weights_));
    }
  }

  // Whoever sits this visit out may be used at the one after, as those of a row that has just run.
  void expected(int row, std::span<const float> probabilities) override {
    Outlook& outlook = outlooks_[at(row)];
    outlook.foresee(probabilities);
    for (int e = 0; e < row_size(row); ++e) {
      const double now = std::min(outlook.likelihood(e, foreseen_weights_), 1.0);
      const double later = kFarthest * outlook.likelihood(e, weights_);
      set_value(first_entry(row) + e, now + (1 - now) * later);
    }
  }

  void guessed(int entry) override { used(entry); }  // its likelihood says what goes before it
  std::optional<double> likelihood(int entry) const override { return worth(entry); }

 private:
  double weight(int row) const override {
    const int rows = row_count();
    const double far = static_cast<double>(distance(row, running_, rows) - 1) / rows;
    return 1 - (1 - kFarthest) * far;
  }

  int running_ = 0;
  Vector<kTerms> weights_ = first_weights<kTerms>();
  Fit<kTerms> fit_;
  Vector<kForeseen> foreseen_weights_ = first_weights<kForeseen>();
  Fit<kForeseen> foreseen_fit_;
  std::vector<Outlook> outlooks_;
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_forecast(std::span<const int> rows) {
  return std::make_unique<Forecast>(rows);
}

std::uint64_t forecast_bytes(std::span<const int> rows) noexcept {
  std::uint64_t bytes = 0;
  for (const int count : rows) bytes += Outlook::bytes(count);
  return bytes;
}

}  // namespace edgert
