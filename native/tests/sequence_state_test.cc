// Two copies of a state of fixed size: which one a step reads and writes, and what rewinding leaves.
#include "model/sequence_state.h"

#include <doctest/doctest.h>

#include <vector>

namespace edgert {
namespace {

Recipe convolutions() {
  Recipe recipe;
  recipe.hidden_size = 20;
  recipe.blocks.emplace_back().mixer = AttentionRecipe{};
  ShortConvRecipe conv;
  conv.conv_kernel = 4;
  recipe.blocks.emplace_back().mixer = conv;
  recipe.layers = {1, 0, 1};
  return recipe;
}

TEST_CASE("only layers that keep a state of fixed size have room in it") {
  const StateLayout layout(convolutions());
  CHECK(layout.layers[0].history == 0);
  CHECK(layout.layers[2].history == 64);  // 3 * 20, in whole lines
  CHECK(layout.floats == 128);
  CHECK(layout.slot_bytes() == 2 * 128 * 4);

  Recipe attention = convolutions();
  attention.layers = {0, 0};
  CHECK(StateLayout(attention).floats == 0);
  CHECK(StateLayout(attention).slot_bytes() == 0);
}

struct Slot {
  StateLayout layout{convolutions()};
  std::vector<std::byte> memory{layout.slot_bytes()};
  SequenceState state{layout.floats};
  Slot() { state.take(memory.data()); }

  // A step that runs the tokens up to `length` in two chunks; returns what it wrote.
  float* step(std::int64_t length) {
    state.begin();
    float* const after = state.after();
    CHECK(state.before(state.length()) != after);
    CHECK(state.before(length) == after);  // a later chunk goes on where the first one left off
    state.settle(length);
    return after;
  }
};

TEST_CASE("a step reads what the last one wrote, and leaves it") {
  Slot slot;
  CHECK(slot.state.before(0) == nullptr);
  const float* const first = slot.step(5);
  CHECK(slot.state.before(5) == first);
  const float* const second = slot.step(9);
  CHECK(second != first);
  CHECK(slot.state.before(9) == second);
  CHECK(slot.state.length() == 9);
}

TEST_CASE("a step that fails leaves the state before it") {
  Slot slot;
  const float* const first = slot.step(5);
  slot.state.begin();
  CHECK(slot.state.after() != first);
  slot.state.rewind(5);
  CHECK(slot.state.length() == 5);
  CHECK(slot.state.before(5) == first);
  slot.state.rewind(4);  // the copy from before was overwritten
  CHECK(slot.state.length() == 0);
}

TEST_CASE("rewinding goes to the newest copy that has not seen too much") {
  Slot slot;
  const float* const first = slot.step(5);
  slot.step(9);
  slot.state.rewind(9);
  CHECK(slot.state.length() == 9);
  slot.state.rewind(7);
  CHECK(slot.state.length() == 5);
  CHECK(slot.state.before(5) == first);
  slot.state.rewind(6);  // tokens that have yet to run again are dropped
  CHECK(slot.state.length() == 5);
  slot.state.rewind(3);
  CHECK(slot.state.length() == 0);
  CHECK(slot.state.before(0) == nullptr);
}

TEST_CASE("a slot is given back as it was taken") {
  Slot slot;
  slot.step(5);
  CHECK(slot.state.give() == slot.memory.data());
  CHECK(!slot.state.has_slot());
}

}  // namespace
}  // namespace edgert
