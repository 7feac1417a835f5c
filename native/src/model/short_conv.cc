// Sequence mixing by a short convolution between two gates.
#include <algorithm>

#include "model/decoder.h"

namespace edgert {

// out(c * convolution(b * x)), where in() gives b, c and x.
void Decoder::mix(int layer, const ShortConvRecipe& c, const ShortConvWeights& w, Activations& in,
                  std::span<const BatchRow> rows) {
  const std::size_t width = 3 * hidden();
  if (any_integer({w.in.format})) quantize(machine_, in, hidden());
  multiply(machine_, {product(w.in, in, s_.q, width, w.in_bias)});
  machine_.for_rows(rows.size(), [&](std::size_t i, int) {
    float* b = s_.q + i * width;
    const float* x = b + 2 * hidden();
    for (std::size_t j = 0; j < hidden(); ++j) b[j] *= x[j];
  });
  Convolution work;
  work.x = s_.q;
  work.x_stride = width;
  work.width = c.conv_kernel;
  work.channels = hidden();
  work.weights = reinterpret_cast<const float*>(w.conv.data);
  work.bias = w.bias;
  work.y = s_.mixed;
  work.y_stride = hidden();
  convolve(work, state_.layers[static_cast<std::size_t>(layer)].history, rows);

  Activations mixed{s_.mixed, hidden(), rows.size(), s_.inputs};
  mixed.quantized.padded = round_up(hidden(), kMaxGroup);
  const bool integer = any_integer({w.o.format});
  machine_.for_rows(rows.size(), [&](std::size_t i, int) {
    const float* gate = s_.q + i * width + hidden();
    float* y = s_.mixed + i * hidden();
    for (std::size_t j = 0; j < hidden(); ++j) y[j] *= gate[j];
    if (integer) quantize_row(machine_, mixed, hidden(), i);
  });
  observe(layer, Site::conv_o, mixed);
  multiply(machine_, {product(w.o, mixed, s_.projected, hidden(), w.o_bias)});
}

// `work` for each sequence's rows, whose history is at `offset` of its state. x and y are those of all rows.
void Decoder::convolve(Convolution work, std::size_t offset, std::span<const BatchRow> rows) {
  constexpr std::size_t kStrips = 16;  // at a time
  const std::size_t strips = (work.channels + kTileRows - 1) / kTileRows;
  const std::size_t pieces = (strips + kStrips - 1) / kStrips;
  machine_.pool.run(static_cast<int>(runs_.size() * pieces), 0, [&](int begin, int end, int) {
    for (int item = begin; item < end; ++item) {
      const auto [first, count] = runs_[static_cast<std::size_t>(item) / pieces];
      const std::size_t strip = static_cast<std::size_t>(item) % pieces * kStrips;
      const SequenceState& state = rows[first].sequence->state();
      const float* before = state.before(rows[first].position);
      Convolution part = work;
      part.x += first * work.x_stride;
      part.y += first * work.y_stride;
      part.rows = count;
      part.history = before == nullptr ? nullptr : before + offset;
      part.next_history = state.after() + offset;
      machine_.kernels.convolution(part, strip, std::min(strip + kStrips, strips));
    }
  });
}

}  // namespace edgert
