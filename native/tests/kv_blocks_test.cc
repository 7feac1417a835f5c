// Blocks of a KV pool: held, shared by what they hold, and taken from the one that was not used for longest.
#include "model/kv_blocks.h"

#include <doctest/doctest.h>

#include <numeric>
#include <vector>

namespace edgert {
namespace {

using Index = KvBlocks::Index;

struct Blocks : KvBlocks {
  explicit Blocks(std::int64_t count) : KvBlocks(count, nullptr) {}

  Index one() {
    Index block = kNone;
    return take(1, std::span(&block, 1)) ? block : kNone;
  }
  // A full block that continues `parent` with the tokens `first`, `first` + 1, ….
  Index full(Index parent, std::int32_t first, std::uint64_t root = 0) {
    const Index block = one();
    std::iota(tokens(block).begin(), tokens(block).end(), first);
    return publish(root, parent, block, epoch());
  }
  Index look(Index parent, std::int32_t first, std::uint64_t root = 0) {
    Tokens wanted;
    std::iota(wanted.begin(), wanted.end(), first);
    return find(root, parent, wanted);
  }
};

TEST_CASE("a block is found by its tokens, by what stands before it, and by its root") {
  Blocks blocks(8);
  const Index first = blocks.full(KvBlocks::kNone, 5);
  const Index second = blocks.full(first, 30);
  CHECK(blocks.look(KvBlocks::kNone, 5) == first);
  CHECK(blocks.look(first, 30) == second);
  CHECK(blocks.look(KvBlocks::kNone, 30) == KvBlocks::kNone);
  CHECK(blocks.look(second, 30) == KvBlocks::kNone);
  CHECK(blocks.look(KvBlocks::kNone, 6) == KvBlocks::kNone);
  CHECK(blocks.look(KvBlocks::kNone, 5, 1) == KvBlocks::kNone);
}

TEST_CASE("what is there already takes the place of what says the same") {
  Blocks blocks(2);
  const Index first = blocks.full(KvBlocks::kNone, 5);
  CHECK(blocks.full(KvBlocks::kNone, 5) == first);
  CHECK(blocks.counts().free == 1);
  blocks.release(first);
  CHECK(blocks.counts().idle == 0);  // the other one holds it still
  blocks.release(first);
  CHECK(blocks.counts().idle == 1);
}

TEST_CASE("only blocks that nobody holds are taken, those unused for longest first, leaves before stems") {
  Blocks blocks(4);
  const Index stem = blocks.full(KvBlocks::kNone, 1);
  const Index leaf = blocks.full(stem, 2);
  const Index other = blocks.full(KvBlocks::kNone, 3);
  const Index held = blocks.full(KvBlocks::kNone, 4);
  CHECK(blocks.one() == KvBlocks::kNone);
  blocks.release(leaf);
  blocks.release(stem);
  blocks.release(other);
  CHECK(blocks.look(KvBlocks::kNone, 1) == stem);  // used again, without its leaf
  blocks.release(stem);
  CHECK(blocks.one() == leaf);
  CHECK(blocks.one() == other);
  CHECK(blocks.one() == stem);
  CHECK(blocks.one() == KvBlocks::kNone);
  CHECK(blocks.look(KvBlocks::kNone, 4) == held);
}

TEST_CASE("too many are not taken at all") {
  Blocks blocks(3);
  std::vector<Index> four(4);
  CHECK_FALSE(blocks.take(4, four));
  CHECK(blocks.counts().free == 3);
  CHECK(blocks.take(3, four));
  CHECK(blocks.counts().free == 0);
}

TEST_CASE("to write in a block it must be one's own") {
  Blocks blocks(3);
  const Index mine = blocks.full(KvBlocks::kNone, 1);
  CHECK(blocks.own(mine) == mine);  // nobody else's: it leaves the tree
  CHECK(blocks.look(KvBlocks::kNone, 1) == KvBlocks::kNone);
  CHECK(blocks.publish(0, KvBlocks::kNone, mine, 0) == mine);
  blocks.hold(mine);
  const Index copy = blocks.own(mine);
  CHECK(copy != mine);
  CHECK(blocks.tokens(copy) == blocks.tokens(mine));
  CHECK(blocks.look(KvBlocks::kNone, 1) == mine);
  blocks.release(mine);
  const Index leaf = blocks.full(mine, 2);
  CHECK(blocks.own(mine) == KvBlocks::kNone);  // it has a leaf, and no block is left for a copy
  blocks.release(leaf);
  CHECK(blocks.own(mine) == leaf);
}

TEST_CASE("what is forgotten is not found, comes back empty, and cannot be published by who began before") {
  Blocks blocks(3);
  const std::uint64_t before = blocks.epoch();
  const Index idle = blocks.full(KvBlocks::kNone, 1);
  blocks.release(idle);
  const Index held = blocks.full(KvBlocks::kNone, 2);
  blocks.forget();
  CHECK(blocks.counts().cached == 0);
  CHECK(blocks.counts().free == 2);
  CHECK(blocks.look(KvBlocks::kNone, 1) == KvBlocks::kNone);
  CHECK(blocks.look(KvBlocks::kNone, 2) == KvBlocks::kNone);
  CHECK(blocks.publish(0, KvBlocks::kNone, held, before) == KvBlocks::kNone);
  blocks.release(held);
  CHECK(blocks.counts().free == 3);
}

}  // namespace
}  // namespace edgert
