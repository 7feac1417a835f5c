#include "platform/memory.h"

#ifdef __GLIBC__
#include <malloc.h>
#endif
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <limits>
#include <system_error>
#include <utility>

#include "platform/cgroup.h"
#include "platform/error.h"

namespace edgert {
namespace fs = std::filesystem;
namespace {

constexpr std::size_t kHugePage = 2 << 20;

}  // namespace

bool Budget::try_charge(std::uint64_t bytes) noexcept {
  std::uint64_t used = used_.load(std::memory_order_relaxed);
  do {
    const std::uint64_t limit = limit_bytes();
    if (bytes > limit || used > limit - bytes) return false;
  } while (!used_.compare_exchange_weak(used, used + bytes, std::memory_order_relaxed));
  raise_peak(used + bytes);
  return true;
}

void Budget::hold(std::uint64_t bytes) noexcept {
  raise_peak(used_.fetch_add(bytes, std::memory_order_relaxed) + bytes);
}

void Budget::raise_peak(std::uint64_t used) noexcept {
  std::uint64_t peak = peak_.load(std::memory_order_relaxed);
  while (peak < used && !peak_.compare_exchange_weak(peak, used, std::memory_order_relaxed)) {
  }
}

void Budget::charge(std::uint64_t bytes, const std::string& what) {
  if (try_charge(bytes)) return;
  throw Error(ErrorKind::budget, what + " needs " + std::to_string(bytes) + " bytes, but " +
                                     std::to_string(used_bytes()) + " of the memory budget of " +
                                     std::to_string(limit_bytes()) + " bytes are in use; allow more memory");
}

void Budget::release(std::uint64_t bytes) noexcept { used_.fetch_sub(bytes, std::memory_order_relaxed); }

std::uint64_t Budget::available_bytes() const noexcept {
  const std::uint64_t limit = limit_bytes();
  return limit - std::min(limit, used_bytes());
}

Buffer::Buffer(std::shared_ptr<Budget> budget, std::size_t bytes, const std::string& what) {
  if (bytes == 0) return;
  if (bytes > std::numeric_limits<std::size_t>::max() - page_size()) {
    throw Error(ErrorKind::budget,
                what + " needs " + std::to_string(bytes) + " bytes: more than can be addressed");
  }
  const std::size_t mapped = round_up(bytes, page_size());
  if (budget) budget->charge(mapped, what);
  void* const pages = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) {
    const int error = errno;
    if (budget) budget->release(mapped);
    throw Error(ErrorKind::budget, what + ": the system gave no " + std::to_string(mapped) +
                                       " bytes: " + std::generic_category().message(error));
  }
  // A wish, for fewer misses in address translation: weights are read once a token, from end to end.
  if (mapped >= kHugePage) madvise(pages, mapped, MADV_HUGEPAGE);
  budget_ = std::move(budget);
  data_ = static_cast<std::byte*>(pages);
  size_ = bytes;
  mapped_ = mapped;
}

Buffer::~Buffer() { reset(); }

Buffer::Buffer(Buffer&& other) noexcept
    : budget_(std::move(other.budget_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      mapped_(std::exchange(other.mapped_, 0)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  if (this != &other) {
    reset();
    budget_ = std::move(other.budget_);
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
    mapped_ = std::exchange(other.mapped_, 0);
  }
  return *this;
}

void Buffer::reset() noexcept {
  if (data_ == nullptr) return;
  munmap(data_, mapped_);
  if (budget_) budget_->release(mapped_);
  budget_.reset();
  data_ = nullptr;
  size_ = mapped_ = 0;
}

Reservation::Reservation(std::uint64_t bytes, const std::string& what) {
  if (bytes > kUnaddressable) {
    throw Error(ErrorKind::budget,
                what + " need " + std::to_string(bytes) + " bytes: more than can be addressed");
  }
  mapped_bytes_ = round_up(bytes, page_size()) + kHugePage;  // so that it can begin at a huge page
  void* const pages = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) {
    throw Error(ErrorKind::budget, what + ": the system gave no " + std::to_string(bytes) +
                                       " bytes of address space: " + std::generic_category().message(errno));
  }
  mapped_ = static_cast<std::byte*>(pages);
  data_ = mapped_ + (kHugePage - reinterpret_cast<std::uintptr_t>(mapped_) % kHugePage) % kHugePage;
  madvise(data_, bytes, MADV_HUGEPAGE);  // a wish
}

Reservation::~Reservation() {
  if (mapped_ != nullptr) munmap(mapped_, mapped_bytes_);
}

Reservation::Reservation(Reservation&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      mapped_(std::exchange(other.mapped_, nullptr)),
      mapped_bytes_(std::exchange(other.mapped_bytes_, 0)) {}

Reservation& Reservation::operator=(Reservation&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(mapped_, other.mapped_);
  std::swap(mapped_bytes_, other.mapped_bytes_);
  return *this;
}

void Reservation::discard(std::size_t offset, std::size_t bytes) noexcept {
  madvise(data_ + offset, bytes, MADV_DONTNEED);
}

std::size_t page_size() noexcept {
  static const auto size = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

std::uint64_t available_memory_bytes(const fs::path& root) {
  constexpr auto kUnbounded = std::numeric_limits<std::uint64_t>::max();
  std::uint64_t available = kUnbounded;
  if (const auto kib = read_field(root / "proc/meminfo", "MemAvailable")) available = *kib * 1024;
  for (const auto& [version, directory] : cgroup_directories("memory", root)) {
    const bool v1 = version == 1;
    std::uint64_t limit =
        read_number(directory / (v1 ? "memory.limit_in_bytes" : "memory.max")).value_or(kUnbounded);
    // Above memory.high the kernel slows a process down until it has given memory back.
    if (!v1) limit = std::min(limit, read_number(directory / "memory.high").value_or(kUnbounded));
    if (limit == kUnbounded) continue;
    const std::uint64_t usage =
        read_number(directory / (v1 ? "memory.usage_in_bytes" : "memory.current")).value_or(0);
    const std::uint64_t cache =
        read_field(directory / "memory.stat", v1 ? "total_inactive_file" : "inactive_file").value_or(0);
    const std::uint64_t held = usage - std::min(usage, cache);
    available = std::min(available, limit - std::min(limit, held));
  }
  return available == kUnbounded ? 0 : available;
}

void release_free_heap() noexcept {
#ifdef __GLIBC__
  malloc_trim(0);
#endif
}

std::uint64_t anonymous_resident_bytes() {
  return read_field("/proc/self/status", "RssAnon").value_or(0) * 1024;
}

}  // namespace edgert
