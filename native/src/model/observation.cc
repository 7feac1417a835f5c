#include "model/observation.h"

#include <algorithm>
#include <type_traits>
#include <utility>

#include "platform/error.h"

namespace edgert {
namespace {

constexpr std::size_t kLine = 64;

struct Length {
  Site site;
  std::size_t length;
};

std::vector<Length> inner_inputs(const AttentionRecipe& a, std::size_t) {
  return {{Site::attention_o, static_cast<std::size_t>(a.num_heads * a.head_dim)}};
}

std::vector<Length> inner_inputs(const LatentAttentionRecipe& a, std::size_t) {
  std::vector<Length> lengths{{Site::attention_k_b, static_cast<std::size_t>(a.nope_head_dim)},
                              {Site::attention_v_b, static_cast<std::size_t>(a.kv_rank)},
                              {Site::attention_o, static_cast<std::size_t>(a.num_heads * a.value_head_dim)}};
  if (a.q_rank) lengths.push_back({Site::attention_q_b, static_cast<std::size_t>(*a.q_rank)});
  return lengths;
}

std::vector<Length> inner_inputs(const GatedDeltaRecipe& d, std::size_t) {
  return {{Site::delta_o, static_cast<std::size_t>(d.values())}};
}

std::vector<Length> inner_inputs(const ShortConvRecipe&, std::size_t hidden) {
  return {{Site::conv_o, hidden}};
}

// Everything of a layer but single experts.
std::vector<Length> inputs_of(const BlockRecipe& block, std::size_t hidden) {
  std::vector<Length> lengths{{Site::mixer, hidden}, {Site::residual, hidden}};
  const auto inner = std::visit([&](const auto& mixer) { return inner_inputs(mixer, hidden); }, block.mixer);
  lengths.insert(lengths.end(), inner.begin(), inner.end());
  lengths.push_back({Site::ffn, hidden});
  const FfnRecipe& ffn = block.ffn;
  if (!ffn.is_moe()) lengths.push_back({Site::ffn_down, static_cast<std::size_t>(ffn.intermediate_size)});
  if (ffn.shared)
    lengths.push_back({Site::shared_down, static_cast<std::size_t>(ffn.shared->intermediate_size)});
  if (ffn.branch_norms) {
    lengths.push_back({Site::router, hidden});
    lengths.push_back({Site::experts, hidden});
  }
  return lengths;
}

const char* name(Site site) {
  switch (site) {
    case Site::mixer:
      return "mixer.input";
    case Site::attention_q_b:
      return "attention.q_b";
    case Site::attention_k_b:
      return "attention.k_b";
    case Site::attention_v_b:
      return "attention.v_b";
    case Site::attention_o:
      return "attention.o";
    case Site::delta_o:
      return "delta.o";
    case Site::conv_o:
      return "conv.o";
    case Site::ffn:
      return "ffn.input";
    case Site::ffn_down:
      return "ffn.down";
    case Site::shared_down:
      return "shared.down";
    case Site::router:
      return "router.input";
    case Site::experts:
      return "experts.input_of_layer";
    case Site::expert_input:
      return "experts.input";
    case Site::expert_inner:
      return "experts.inner";
    case Site::output:
      return "output";
    case Site::residual:
      return "residual";
  }
  return "";
}

std::string prefix(int layer) { return layer < 0 ? "" : "layers." + std::to_string(layer) + "."; }

class Arena {
 public:
  explicit Arena(std::byte* base) : base_(base) {}
  template <typename T>
  std::span<T> take(std::size_t count) {
    const std::size_t at = bytes_;
    bytes_ = round_up(bytes_ + count * sizeof(T), kLine);
    return base_ == nullptr ? std::span<T>() : std::span<T>(reinterpret_cast<T*>(base_ + at), count);
  }
  std::size_t bytes() const noexcept { return bytes_; }

 private:
  std::byte* base_;
  std::size_t bytes_ = 0;
};

}  // namespace

MomentsKind moments(const std::string& word) {
  if (word == "none") return MomentsKind::none;
  if (word == "diagonal") return MomentsKind::diagonal;
  if (word == "full") return MomentsKind::full;
  if (word == "auto") return MomentsKind::automatic;
  throw Error(ErrorKind::invalid_argument,
              "moments: found '" + word + "', allowed none, diagonal, full, auto");
}

// With a null base the spans are empty, and only sizes mean anything.
Observation::Layout Observation::layout(const Recipe& recipe, Whole whole, std::byte* base) {
  Arena arena(base);
  Layout out;
  const auto hidden = static_cast<std::size_t>(recipe.hidden_size);
  out.longest = hidden;
  out.tokens = arena.take<std::int64_t>(1).data();
  const auto add = [&](int layer, Site site, std::size_t sets, std::size_t length, bool full) {
    Inputs& in = out.inputs.emplace_back(Inputs{layer, site, sets, length, full, {}, {}});
    in.counts = arena.take<std::int64_t>(sets);
    in.sums = arena.take<double>(sets * in.size());
    if (full) out.longest = std::max(out.longest, length);
  };
  for (int layer = 0; layer < recipe.num_layers(); ++layer) {
    const FfnRecipe& ffn = recipe.block(layer).ffn;
    for (const Length& in : inputs_of(recipe.block(layer), hidden)) {
      const bool of_moe =
          ffn.is_moe() && (in.site == Site::ffn || in.site == Site::router || in.site == Site::experts);
      const bool full = of_moe ? whole.moe : whole.dense && in.site != Site::residual;
      add(layer, in.site, 1, in.length, full);
    }
    if (!ffn.is_moe()) continue;
    const auto experts = static_cast<std::size_t>(ffn.num_experts);
    const auto top = static_cast<std::size_t>(ffn.num_experts_per_tok);
    add(layer, Site::expert_input, experts, hidden, whole.single_experts);
    add(layer, Site::expert_inner, experts, static_cast<std::size_t>(ffn.intermediate_size),
        whole.single_experts);
    out.longest = std::max(out.longest, experts);
    Routing& r = out.routing.emplace_back();
    r.layer = layer;
    r.experts = experts;
    r.top = top;
    r.tokens = arena.take<std::int64_t>(experts);
    r.token_before = arena.take<std::int64_t>(experts * experts);
    r.weight = arena.take<double>(experts);
    r.weight_squared = arena.take<double>(experts);
    r.mean = arena.take<double>(hidden);
    r.logits = arena.take<double>(experts);
    r.last = arena.take<std::int32_t>(top);
  }
  add(-1, Site::output, 1, hidden, whole.dense);
  for (std::size_t m = 0; m < out.routing.size(); ++m) {
    for (std::size_t d = 1; d <= 2 && m + d < out.routing.size(); ++d) {
      Routing& ahead = out.routing[m + d];
      ahead.before[d - 1] = arena.take<std::int64_t>(out.routing[m].experts * ahead.experts);
      out.routing[m].cross[d - 1] = arena.take<double>(hidden * ahead.experts);
    }
  }
  out.bytes = arena.bytes();
  return out;
}

Observation::Whole Observation::whole(const Recipe& recipe, MomentsKind moments) {
  if (moments == MomentsKind::full) return {true, true, true};
  if (moments != MomentsKind::automatic) return {false, false, false};
  for (const Whole whole : {Whole{true, true, true}, {false, true, true}, {false, false, true}}) {
    if (layout(recipe, whole, nullptr).bytes <= kAutomaticBytes) return whole;
  }
  return {false, false, false};
}

std::uint64_t Observation::sums_bytes(const Recipe& recipe, MomentsKind moments) {
  return round_up(layout(recipe, whole(recipe, moments), nullptr).bytes, page_size());
}

namespace {

std::size_t rows_bytes(const Recipe& recipe, int rows) {
  std::size_t bytes = 2 * static_cast<std::size_t>(recipe.hidden_size) * sizeof(float);
  for (int layer = 0; layer < recipe.num_layers(); ++layer)
    bytes += static_cast<std::size_t>(recipe.block(layer).ffn.num_experts_per_tok) * sizeof(std::int32_t);
  return bytes * static_cast<std::size_t>(rows);
}

}  // namespace

std::uint64_t Observation::scratch_bytes(const Recipe& recipe, MomentsKind moments, int rows, int threads) {
  const std::size_t longest = layout(recipe, whole(recipe, moments), nullptr).longest;
  return round_up(rows_bytes(recipe, rows), page_size()) +
         round_up(OuterSums::scratch_bytes(longest, threads), page_size());
}

Observation::Observation(const Recipe& recipe, MomentsKind moments, Machine machine,
                         std::shared_ptr<Budget> budget, int rows)
    : recipe_(recipe),
      sums_(machine, budget, layout(recipe, whole(recipe, moments), nullptr).longest),
      memory_(budget, layout(recipe, whole(recipe, moments), nullptr).bytes, "calibration"),
      scratch_(budget, rows_bytes(recipe, rows), "calibration"),
      moe_(recipe.layers.size()) {
  Layout made = layout(recipe, whole(recipe, moments), memory_.data());
  tokens_ = made.tokens;
  inputs_ = std::move(made.inputs);
  routing_ = std::move(made.routing);
  const auto most = static_cast<std::size_t>(rows);
  follows_.reserve(most);
  float* x = scratch_.as<float>();
  for (float*& kept : x_) {
    kept = x;
    x += most * static_cast<std::size_t>(recipe.hidden_size);
  }
  auto* chosen = reinterpret_cast<std::int32_t*>(x);
  for (std::size_t m = 0; m < routing_.size(); ++m) {
    Routing& r = routing_[m];
    moe_[static_cast<std::size_t>(r.layer)] = m;
    r.chosen = {chosen, most * r.top};
    chosen += most * r.top;
  }
}

void Observation::begin(std::span<const BatchRow> rows) {
  rows_ = rows.size();
  *tokens_ += static_cast<std::int64_t>(rows_);
  follows_.clear();
  for (const BatchRow& row : rows) {
    follows_.push_back(row.sequence == last_sequence_ && row.position == last_position_ + 1);
    last_sequence_ = row.sequence;
    last_position_ = row.position;
  }
}

Observation::Inputs& Observation::inputs(int layer, Site site) {
  return *std::find_if(inputs_.begin(), inputs_.end(),
                       [&](const Inputs& in) { return in.layer == layer && in.site == site; });
}

void Observation::add(const Inputs& in, std::span<const OuterSums::Work> work) {
  if (in.full) {
    sums_.add_triangles(work, in.length);
  } else {
    sums_.add_squares(work, in.length);
  }
}

void Observation::input(int layer, Site site, const ObservedRows& rows) {
  const Inputs& in = inputs(layer, site);
  in.counts[0] += static_cast<std::int64_t>(rows.count);
  const OuterSums::Work work{rows, rows, in.sums.data()};
  add(in, std::span(&work, 1));
}

void Observation::experts(int layer, Site site, std::span<const ObservedExpert> groups) {
  const Inputs& in = inputs(layer, site);
  std::vector<OuterSums::Work> work;
  for (const ObservedExpert& group : groups) {
    const auto set = static_cast<std::size_t>(group.expert);
    in.counts[set] += static_cast<std::int64_t>(group.rows.count);
    work.push_back({group.rows, group.rows, in.sums.data() + set * in.size()});
  }
  add(in, work);
}

void Observation::router(int layer, const ObservedRows& x, const float* logits) {
  const std::size_t m = moe_index(layer);
  const Routing& here = routing_[m];
  const auto hidden = static_cast<std::size_t>(recipe_.hidden_size);
  const ObservedRows scores{logits, here.experts, x.count};
  sums_.add_rows({x, {}, here.mean.data()}, hidden);
  sums_.add_rows({scores, {}, here.logits.data()}, here.experts);
  for (std::size_t d = 1; d <= std::min<std::size_t>(2, m); ++d) {
    const OuterSums::Work work{
        {x_[(m - d) % 2], hidden, x.count}, scores, routing_[m - d].cross[d - 1].data()};
    sums_.add(std::span(&work, 1), hidden, here.experts);
  }
  for (std::size_t i = 0; i < x.count; ++i) std::copy_n(x.row(i), hidden, x_[m % 2] + i * hidden);
}

void Observation::count_pairs(std::span<const std::int32_t> before, std::span<const std::int32_t> now,
                              std::size_t experts, std::span<std::int64_t> counts) {
  for (const std::int32_t from : before) {
    for (const std::int32_t to : now)
      ++counts[static_cast<std::size_t>(from) * experts + static_cast<std::size_t>(to)];
  }
}

void Observation::routed(int layer, const std::int32_t* experts, const float* weights) {
  const std::size_t m = moe_index(layer);
  const Routing& here = routing_[m];
  const auto row_of = [&](const Routing& of, std::size_t i) {
    return std::span<const std::int32_t>(of.chosen).subspan(i * of.top, of.top);
  };
  std::copy_n(experts, rows_ * here.top, here.chosen.begin());
  for (std::size_t i = 0; i < rows_; ++i) {
    const auto now = row_of(here, i);
    for (std::size_t n = 0; n < here.top; ++n) {
      const auto expert = static_cast<std::size_t>(now[n]);
      const auto weight = static_cast<double>(weights[i * here.top + n]);
      ++here.tokens[expert];
      here.weight[expert] += weight;
      here.weight_squared[expert] += weight * weight;
    }
    for (std::size_t d = 1; d <= std::min<std::size_t>(2, m); ++d)
      count_pairs(row_of(routing_[m - d], i), now, here.experts, here.before[d - 1]);
    if (follows_[i])
      count_pairs(i == 0 ? here.last : row_of(here, i - 1), now, here.experts, here.token_before);
  }
  std::ranges::copy(row_of(here, rows_ - 1), here.last.begin());
}

std::vector<Observation::Statistic> Observation::statistics() const {
  std::vector<Statistic> out;
  const auto hidden = static_cast<std::size_t>(recipe_.hidden_size);
  for (const Inputs& in : inputs_) {
    const std::string form = in.full ? ".triangle" : ".diagonal";
    std::vector<std::size_t> shape{in.size()};
    if (in.site == Site::expert_input || in.site == Site::expert_inner) shape.insert(shape.begin(), in.sets);
    out.push_back({prefix(in.layer) + name(in.site) + form, std::move(shape), in.counts, in.sums, true});
  }
  const std::span<const std::int64_t> tokens(tokens_, 1);
  for (std::size_t m = 0; m < routing_.size(); ++m) {
    const Routing& r = routing_[m];
    const std::string at = prefix(r.layer);
    out.push_back({at + "experts.tokens", {r.experts}, r.tokens, {}});
    out.push_back({at + "experts.weight", {r.experts}, {}, r.weight});
    out.push_back({at + "experts.weight_squared", {r.experts}, {}, r.weight_squared});
    out.push_back({at + "experts.token_before", {r.experts, r.experts}, r.token_before, {}});
    out.push_back({at + "router.mean", {hidden}, tokens, r.mean, true});
    out.push_back({at + "router.logits", {r.experts}, tokens, r.logits, true});
    for (std::size_t d = 1; d <= 2; ++d) {
      const std::string ending = "_" + std::to_string(d);
      if (m >= d) {
        out.push_back(
            {at + "experts.before" + ending, {routing_[m - d].experts, r.experts}, r.before[d - 1], {}});
      }
      if (m + d < routing_.size()) {
        out.push_back(
            {at + "router.cross" + ending, {hidden, routing_[m + d].experts}, tokens, r.cross[d - 1], true});
      }
    }
  }
  return out;
}

}  // namespace edgert
