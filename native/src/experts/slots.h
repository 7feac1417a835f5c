// Memory for experts: slots of one size lie side by side in one stretch of address space.
//
// Neighbours share huge pages, which storage fills twice as fast as scattered small pages and which the
// processor translates with fewer misses. A slot that is given back returns its memory to the system, its
// place is taken again later; what goes from one expert to the next of the same size is moved and keeps its
// pages.
//
// Threads: the pool and its slots belong to one thread at a time. Ownership: slots must not outlive their
// pool. Nothing is charged here: the store has paid for its whole capacity.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <map>
#include <queue>
#include <span>
#include <utility>
#include <vector>

#include "platform/memory.h"

namespace edgert {

class SlotPool {
  struct Area {
    Reservation memory;
    std::priority_queue<std::uint32_t, std::vector<std::uint32_t>, std::greater<>> free;  // lowest first
  };

 public:
  // One entry of `sizes` an expert, each a multiple of the page; at most `capacity_bytes` of a size are
  // taken. Error{budget} where there is no address space for that.
  SlotPool(std::span<const std::uint64_t> sizes, std::uint64_t capacity_bytes);

  class Slot {
   public:
    Slot() = default;
    Slot(Slot&& other) noexcept { swap(other); }
    Slot& operator=(Slot&& other) noexcept {
      Slot(std::move(other)).swap(*this);
      return *this;
    }
    ~Slot();
    std::byte* data() const noexcept { return data_; }
    std::size_t size() const noexcept { return size_; }
    std::span<std::byte> span() const noexcept { return {data_, size_}; }

   private:
    friend class SlotPool;
    Slot(Area& area, std::uint32_t index, std::size_t size) noexcept
        : area_(&area), index_(index), data_(area.memory.data() + index * size), size_(size) {}
    void swap(Slot& other) noexcept;
    Area* area_ = nullptr;
    std::uint32_t index_ = 0;
    std::byte* data_ = nullptr;
    std::size_t size_ = 0;
  };

  // Room for slots of `capacity_bytes` of each size, beside what there is; Error{budget} as above.
  void grow(std::uint64_t capacity_bytes);

  // REQUIRES one of the sizes of the constructor, and that the slots in use and this one fit the capacity.
  Slot take(std::uint64_t bytes);

 private:
  struct Size {
    std::uint64_t experts = 0;
    std::uint64_t places = 0;
    std::list<Area> areas;  // one, and another each time that the pool grew; slots know theirs
  };
  std::map<std::uint64_t, Size> sizes_;
};

}  // namespace edgert
