// Sequence state of fixed size: what convolutions and recurrences carry from one token to the next.
//
// Unlike a KV cache it forgets what it was, so a sequence keeps two copies: after its last step, and before
// it. A step reads the one and writes the other; a step that fails has lost nothing, and rewinding to before
// the last step is free. Rewinding further (or to within a step) runs the tokens in between again, from the
// copy or from the start: the KV cache keeps them for that, and by law 1 give the bits that they gave.
//
// Threads: as KvSequence, which owns it. Ownership: borrows a slot of the pool.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "model/recipe.h"

namespace edgert {

// Where the layers' states lie in one copy, in floats.
struct StateLayout {
  explicit StateLayout(const Recipe& recipe);

  struct Layer {
    std::size_t history = 0;     // [conv_kernel - 1][channels]
    std::size_t recurrence = 0;  // [value heads][delta_state_floats]
  };
  std::vector<Layer> layers;
  std::size_t floats = 0;  // of a copy; 0: the model has no such state

  // Of the copies of one sequence; 0 where there is no state.
  std::size_t slot_bytes() const noexcept { return 2 * floats * sizeof(float); }
};

class SequenceState {
 public:
  explicit SequenceState(std::size_t floats) : floats_(floats) {}

  bool has_slot() const noexcept { return slot_ != nullptr; }
  void take(std::byte* slot) noexcept;
  std::byte* give() noexcept;

  // REQUIRE a slot, but for length().
  std::int64_t length() const noexcept { return length_; }  // tokens that the state has seen
  // Around a step that runs the tokens from length() on.
  void begin() noexcept { older_ = -1; }
  void settle(std::int64_t length) noexcept;
  // State before the token at `position` (null: zeros), and where the state after it belongs. A call may take
  // several tokens at a time: then it writes what follows the last.
  const float* before(std::int64_t position) const noexcept;
  float* after() const noexcept { return copy(1 - kept_); }
  // The state itself, and that it was filled with one that has seen `length` tokens.
  float* kept() const noexcept { return copy(kept_); }
  void restore(std::int64_t length) noexcept;
  // Back to a state that has seen `length` tokens at most.
  void rewind(std::int64_t length) noexcept;

 private:
  float* copy(int index) const noexcept;

  std::size_t floats_;
  std::byte* slot_ = nullptr;
  int kept_ = 0;  // the copy that has seen length_ tokens
  std::int64_t length_ = 0;
  std::int64_t older_ = -1;  // what the other one has seen; -1: nothing that counts
};

}  // namespace edgert
