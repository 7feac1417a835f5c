// Slots of one size lie side by side; memory goes back to the system with the slot and comes again as zeros.
#include "experts/slots.h"

#include <doctest/doctest.h>

#include <algorithm>

#include "platform/memory.h"

namespace edgert {
namespace {

bool all(std::span<const std::byte> bytes, int value) {
  return std::all_of(bytes.begin(), bytes.end(),
                     [&](std::byte b) { return b == static_cast<std::byte>(value); });
}

TEST_CASE("slots of one size lie side by side, the lowest free one first") {
  const std::size_t page = page_size();
  const std::vector<std::uint64_t> sizes(5, 3 * page);
  SlotPool pool(sizes, 10 * page);  // three of them
  SlotPool::Slot first = pool.take(3 * page), second = pool.take(3 * page), third = pool.take(3 * page);
  CHECK(first.size() == 3 * page);
  CHECK(second.data() == first.data() + 3 * page);
  CHECK(third.data() == second.data() + 3 * page);
  std::byte* const place = first.data();
  third = {};
  first = {};
  CHECK(pool.take(3 * page).data() == place);
}

TEST_CASE("a slot that moves keeps its bytes, one that is given back does not") {
  const std::size_t page = page_size();
  const std::vector<std::uint64_t> sizes(2, page);
  SlotPool pool(sizes, 2 * page);
  SlotPool::Slot slot = pool.take(page);
  SlotPool::Slot neighbour = pool.take(page);
  std::fill(slot.span().begin(), slot.span().end(), std::byte{7});
  std::fill(neighbour.span().begin(), neighbour.span().end(), std::byte{9});
  SlotPool::Slot moved = std::move(slot);
  CHECK(slot.data() == nullptr);
  CHECK(all(moved.span(), 7));
  moved = {};
  CHECK(all(pool.take(page).span(), 0));
  CHECK(all(neighbour.span(), 9));
}

TEST_CASE("sizes do not share places") {
  const std::size_t page = page_size();
  const std::vector<std::uint64_t> sizes = {page, 2 * page, page};
  SlotPool pool(sizes, 4 * page);
  SlotPool::Slot small = pool.take(page), large = pool.take(2 * page), other = pool.take(page);
  for (const auto* slot : {&small, &large, &other}) {
    std::fill(slot->span().begin(), slot->span().end(), static_cast<std::byte>(slot->size() / page));
  }
  CHECK(all(small.span(), 1));
  CHECK(all(large.span(), 2));
  CHECK(all(other.span(), 1));
}

TEST_CASE("a reservation begins at a page, reads as zeros, and again after a part was given back") {
  const std::size_t page = page_size();
  Reservation memory(3 * page, "test");
  CHECK(reinterpret_cast<std::uintptr_t>(memory.data()) % page == 0);
  const std::span bytes(memory.data(), 3 * page);
  CHECK(all(bytes, 0));
  std::fill(bytes.begin(), bytes.end(), std::byte{1});
  memory.discard(page, page);
  CHECK(all(bytes.first(page), 1));
  CHECK(all(bytes.subspan(page, page), 0));
  CHECK(all(bytes.last(page), 1));
}

}  // namespace
}  // namespace edgert
