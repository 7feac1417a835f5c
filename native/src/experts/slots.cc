#include "experts/slots.h"

#include <algorithm>

namespace edgert {

SlotPool::SlotPool(std::span<const std::uint64_t> sizes, std::uint64_t capacity_bytes) {
  for (const std::uint64_t size : sizes) ++sizes_[size].experts;
  grow(capacity_bytes);
}

void SlotPool::grow(std::uint64_t capacity_bytes) {
  for (auto& [bytes, size] : sizes_) {
    const std::uint64_t wanted = std::min(size.experts, capacity_bytes / bytes);
    if (wanted <= size.places) continue;
    const auto added = static_cast<std::uint32_t>(wanted - size.places);
    Area area;
    area.memory = Reservation(added * bytes, "expert slots");
    for (std::uint32_t i = 0; i < added; ++i) area.free.push(i);
    size.areas.push_back(std::move(area));
    size.places = wanted;
  }
}

SlotPool::Slot SlotPool::take(std::uint64_t bytes) {
  auto& areas = sizes_.at(bytes).areas;
  Area& area = *std::ranges::find_if(areas, [](const Area& candidate) { return !candidate.free.empty(); });
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
