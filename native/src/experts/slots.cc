#include "experts/slots.h"

#include <algorithm>

namespace edgert {

SlotPool::SlotPool(std::span<const std::uint64_t> sizes, std::uint64_t capacity_bytes) {
  std::map<std::uint64_t, std::uint64_t> counts;
  for (const std::uint64_t size : sizes) ++counts[size];
  for (const auto& [size, experts] : counts) {
    const auto slots = static_cast<std::uint32_t>(std::min(experts, capacity_bytes / size));
    if (slots == 0) continue;
    Area& area = areas_[size];
    area.memory = Reservation(slots * size, "expert slots");
    for (std::uint32_t i = 0; i < slots; ++i) area.free.push(i);
  }
}

SlotPool::Slot SlotPool::take(std::uint64_t bytes) {
  Area& area = areas_.at(bytes);
  const std::uint32_t index = area.free.top();
  area.free.pop();
  return Slot(area, index, bytes);
}

SlotPool::Slot::~Slot() {
  if (area_ == nullptr) return;
  area_->memory.discard(index_ * size_, size_);
  area_->free.push(index_);
}

void SlotPool::Slot::swap(Slot& other) noexcept {
  std::swap(area_, other.area_);
  std::swap(index_, other.index_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
}

}  // namespace edgert
