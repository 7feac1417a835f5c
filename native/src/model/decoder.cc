#include "model/decoder.h"

#include <algorithm>
#include <cmath>

#include "platform/error.h"
#include "quant/pack.h"

namespace edgert {

namespace {

// The most that one multiply() has: the projections of a mixer, or gate and up of a group of experts.
std::size_t overlay_rows(const Recipe& recipe, const ScratchShape& shape) {
  constexpr std::size_t kProjections = 6;
  const Scratch scratch = Scratch::layout(recipe, shape, nullptr);
  return std::max(kProjections * static_cast<std::size_t>(shape.rows),
                  2 * (scratch.group_rows + static_cast<std::size_t>(shape.rows)));
}

int added_tokens(const AdapterMix* mix) { return mix == nullptr ? 0 : static_cast<int>(mix->added_tokens); }

}  // namespace

Decoder::Decoder(const Bundle& bundle, const Recipe& recipe, const Weights& weights, ExpertStore& store,
                 const KvPool& pool, Machine machine, std::shared_ptr<Budget> budget,
                 const ScratchShape& shape)
    : bundle_(bundle),
      recipe_(recipe),
      weights_(weights),
      store_(store),
      kv_(pool.layout()),
      state_(pool.state_layout()),
      budget_(budget),
      overlay_(budget, overlay_rows(recipe, shape), shape.threads),
      machine_{machine.pool, machine.kernels, &overlay_},
      shape_(shape),
      memory_(std::move(budget), Scratch::layout(recipe, shape, nullptr).bytes, "scratch"),
      s_(Scratch::layout(recipe, shape, memory_.data())) {
  for (int layer = 0, row = 0; layer < recipe.num_layers(); ++layer) {
    moe_rows_.push_back(row);
    if (recipe.block(layer).ffn.is_moe()) ++row;
  }
}

void Decoder::reserve(const std::shared_ptr<const AdapterMix>& mix) {
  overlay_.reserve(mix);
  if (mix->added_tokens <= added_tokens_) return;
  const std::size_t width = static_cast<std::size_t>(recipe_.vocab_size) + mix->added_tokens;
  wide_logits_ = Buffer(budget_, static_cast<std::size_t>(s_.logit_rows) * width * sizeof(float),
                        "logits of added tokens");
  added_tokens_ = mix->added_tokens;
}

bool Decoder::trim() {
  if (!overlay_.trim()) return false;
  wide_logits_ = Buffer();
  added_tokens_ = 0;
  return true;
}

void StepControl::check() const {
  if (cancelled.load(std::memory_order_relaxed)) throw Error(ErrorKind::cancelled, "cancelled");
  if (poll) poll();
}

void Decoder::run(std::span<const BatchRow> rows, const StepControl& control, const LogitsSink& sink) {
  mixes_.clear();
  for (const BatchRow& row : rows) mixes_.push_back(row.sequence->mix());
  overlay_.begin(mixes_);
  Preloader* const preloader = rows.size() == 1 ? preloader_ : nullptr;
  if (preloader != nullptr) preloader->begin_step();
  embed(rows);
  rotated_ = nullptr;
  find_runs(rows, shape_.rows, runs_, [](std::size_t) { return true; });
  if (observer_ != nullptr) observer_->begin(rows);
  for (int layer = 0; layer < recipe_.num_layers(); ++layer) {
    control.check();
    mix(layer, rows);
    ffn(layer, rows, control);
    if (const float* scale = weights_.layer(layer).scale) {
      for (float& value : std::span(s_.x, rows.size() * hidden())) value *= *scale;
    }
    observe(layer, Site::residual, {s_.x, hidden(), rows.size(), {}});
  }
  if (observer_ != nullptr) observe_output(rows.size());
  output(rows, control, sink);
  if (preloader != nullptr) preloader->end_step();
}

// Of every row, whether its logits are wanted or not.
void Decoder::observe_output(std::size_t rows) {
  machine_.for_rows(rows, [&](std::size_t i, int) {
    norm(recipe_.final_norm, weights_.final_norm(), recipe_.final_norm_eps, i, s_.x + i * hidden(),
         s_.normed + i * hidden());
  });
  observe(-1, Site::output, {s_.normed, hidden(), rows, {}});
}

void Decoder::mix(int layer, std::span<const BatchRow> rows) {
  const BlockRecipe& block = recipe_.block(layer);
  Activations in = normed(weights_.layer(layer).attention_norm, block, rows.size());
  observe(layer, Site::mixer, in);
  std::visit(
      [&](const auto& recipe, const auto& weights) {
        // Weights are bound by their recipe: other pairs do not occur.
        if constexpr (requires { mix(layer, recipe, weights, in, rows); })
          mix(layer, recipe, weights, in, rows);
      },
      block.mixer, weights_.layer(layer).mixer);
  add_residual(s_.projected, weights_.layer(layer).attention_post_norm, block, rows.size());
}

void Decoder::embed(std::span<const BatchRow> rows) {
  const Matrix& e = weights_.embedding();
  const std::span packed(e.data, packed_bytes(format(e.format), e.rows, e.cols));
  machine_.for_rows(rows.size(), [&](std::size_t i, int) {
    const std::span out(s_.x + i * hidden(), hidden());
    const bool own = rows[i].token < recipe_.vocab_size;
    const bool known = own || rows[i].token < recipe_.vocab_size + added_tokens(mixes_[i]);
    std::fill(out.begin(), out.end(), 0.0F);
    if (own)
      unpack_row(format(e.format), packed, e.rows, e.cols, static_cast<std::size_t>(rows[i].token), out);
    if (mixes_[i] != nullptr)
      mixes_[i]->replace_row(e.target, rows[i].token, out, {s_.normed + i * hidden(), hidden()});
    if (recipe_.embedding_scale != 1 && known) {
      for (float& value : out) value *= recipe_.embedding_scale;
    }
  });
}

void Decoder::norm(Norm kind, const NormWeights& w, float eps, std::size_t row, const float* x,
                   float* y) const {
  const float* weight = w.weight;
  if (mixes_[row] != nullptr && mixes_[row]->shift(w.target, {weight, hidden()}, {y, hidden()})) weight = y;
  if (kind == Norm::rms) return machine_.kernels.rms_norm(x, weight, hidden(), eps, y);
  machine_.kernels.layer_norm(x, weight, w.bias, hidden(), eps, y);
}

Activations Decoder::normed(const NormWeights& weights, const BlockRecipe& block, std::size_t rows) {
  machine_.for_rows(rows, [&](std::size_t i, int) {
    norm(block.norm, weights, block.norm_eps, i, s_.x + i * hidden(), s_.normed + i * hidden());
  });
  return {s_.normed, hidden(), rows, s_.inputs};
}

void Decoder::add_residual(float* y, const float* post_norm, const BlockRecipe& block, std::size_t rows) {
  machine_.for_rows(rows, [&](std::size_t i, int) {
    float* x = s_.x + i * hidden();
    float* add = y + i * hidden();
    if (post_norm != nullptr) machine_.kernels.rms_norm(add, post_norm, hidden(), block.norm_eps, add);
    for (std::size_t j = 0; j < hidden(); ++j) x[j] += block.residual_scale * add[j];
  });
}

void Decoder::output(std::span<const BatchRow> rows, const StepControl& control, const LogitsSink& sink) {
  const Matrix& head = weights_.output();
  const auto vocab = static_cast<std::size_t>(recipe_.vocab_size);
  std::size_t next = 0;
  while (true) {
    // The rows that want logits, as many at a time as there is room for, moved together.
    std::int32_t wanted[64];
    std::size_t count = 0;
    for (; next < rows.size() && count < static_cast<std::size_t>(s_.logit_rows); ++next) {
      if (rows[next].wants_logits) wanted[count++] = static_cast<std::int32_t>(next);
    }
    if (count == 0) return;
    control.check();
    int added = 0;
    for (std::size_t i = 0; i < count; ++i)
      added = std::max(added, added_tokens(mixes_[static_cast<std::size_t>(wanted[i])]));
    const std::size_t width = vocab + static_cast<std::size_t>(added);
    float* const y = added == 0 ? s_.logits : wide_logits_.as<float>();
    for (std::size_t i = 0; i < count; ++i) {
      std::fill(y + i * width + vocab, y + (i + 1) * width, 0.0F);
      norm(recipe_.final_norm, weights_.final_norm(), recipe_.final_norm_eps,
           static_cast<std::size_t>(wanted[i]), s_.x + static_cast<std::size_t>(wanted[i]) * hidden(),
           s_.normed + i * hidden());
    }
    Activations in{s_.normed, hidden(), count, s_.inputs};
    if (any_integer({head.format})) quantize(machine_, in, hidden());
    Product logits = product(head, in, y, width, weights_.output_bias());
    logits.batch_rows = wanted;
    multiply(machine_, {logits});
    for (std::size_t i = 0; i < count; ++i) {
      const int own = added_tokens(mixes_[static_cast<std::size_t>(wanted[i])]);
      const std::span row(y + i * width, vocab + static_cast<std::size_t>(own));
      if (recipe_.output_scale != 1) {
        for (float& value : row) value *= recipe_.output_scale;
      }
      if (const float cap = recipe_.output_softcap; cap > 0) {
        for (float& value : row) value = std::tanh(value / cap) * cap;
      }
      sink(static_cast<std::size_t>(wanted[i]), row);
    }
  }
}

}  // namespace edgert
