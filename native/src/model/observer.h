// What a decoder shows of a step to whoever measures a model: the inputs of its matrices, as floats, and what
// its routers choose.
//
// Threads: called by the thread that runs the step, in the order of the layers; an observer may use the pool.
// Ownership: rows are the decoder's, and valid during the call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace edgert {

struct BatchRow;

// Whose input: of a layer's matrices, or of the output's. Matrices that read the same rows share a site.
enum class Site : std::uint8_t {
  mixer,          // what is projected first: q, k and v, say
  attention_q_b,  // of latent attention, as are the next two; those have a row for each head
  attention_k_b,
  attention_v_b,
  attention_o,
  delta_o,
  conv_o,
  ffn,           // gate and up, dense or shared; router and routed experts too, unless they have norms
  ffn_down,      // of a dense ffn
  shared_down,   // of a shared expert
  router,        // where it has a norm of its own
  experts,       // where they have a norm of their own
  expert_input,  // gate and up of single experts
  expert_inner,  // down of single experts
  output,
  residual,  // no matrix's: the hidden state behind a layer
};

struct ObservedRows {
  const float* x = nullptr;
  std::size_t stride = 0;
  std::size_t count = 0;
  const std::int32_t* gather = nullptr;  // the i-th is row gather[i]; null: row i

  const float* row(std::size_t i) const noexcept {
    return x + (gather != nullptr ? static_cast<std::size_t>(gather[i]) : i) * stride;
  }
};

struct ObservedExpert {
  int expert = 0;
  ObservedRows rows;  // of the tokens that use it
};

class Observer {
 public:
  virtual ~Observer() = default;
  virtual void begin(std::span<const BatchRow> rows) = 0;  // of a step, before its first layer
  // Inputs of dense matrices; layer -1 for the output's, which are shown of every row.
  virtual void input(int layer, Site site, const ObservedRows& rows) = 0;
  // A router's input and its logits, biased where the recipe biases logits.
  virtual void router(int layer, const ObservedRows& x, const float* logits) = 0;
  // Its choice: [rows][num_experts_per_tok], ascending ids.
  virtual void routed(int layer, const std::int32_t* experts, const float* weights) = 0;
  // expert_input or expert_inner of some experts; a step shows each expert that it uses once.
  virtual void experts(int layer, Site site, std::span<const ObservedExpert> groups) = 0;
};

}  // namespace edgert
