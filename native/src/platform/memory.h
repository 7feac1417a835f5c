// Memory that is counted: a Budget bounds what Buffers may take.
//
// Threads: Budget is thread-safe. A Buffer is owned by one thread at a time.
// Ownership: a Buffer returns its pages to the system and its charge to the budget when it dies; the
// budget must outlive its buffers (hold it by shared_ptr).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <utility>

namespace edgert {

// Sizes computed from what a file says stop here: past any memory, far from overflow.
inline constexpr std::uint64_t kUnaddressable = std::uint64_t{1} << 60;

class Budget {
 public:
  explicit Budget(std::uint64_t limit_bytes) : limit_(limit_bytes) {}
  // Throws Error{budget} naming `what`, the request, what is used and the limit.
  void charge(std::uint64_t bytes, const std::string& what);
  // Like charge, but answers false where the limit would be passed.
  bool try_charge(std::uint64_t bytes) noexcept;
  // Counts memory that is taken already, even past the limit: what is asked for next is refused.
  void hold(std::uint64_t bytes) noexcept;
  void release(std::uint64_t bytes) noexcept;
  std::uint64_t limit_bytes() const noexcept { return limit_.load(std::memory_order_relaxed); }
  // What is in use stays so, even past a lower limit: what is asked for next is refused.
  void set_limit(std::uint64_t bytes) noexcept { limit_.store(bytes, std::memory_order_relaxed); }
  std::uint64_t used_bytes() const noexcept { return used_.load(std::memory_order_relaxed); }
  std::uint64_t peak_bytes() const noexcept { return peak_.load(std::memory_order_relaxed); }
  std::uint64_t available_bytes() const noexcept;

 private:
  void raise_peak(std::uint64_t used) noexcept;
  std::atomic<std::uint64_t> limit_;
  std::atomic<std::uint64_t> used_{0};
  std::atomic<std::uint64_t> peak_{0};
};

// Anonymous zeroed pages straight from the system (mmap), page aligned, sized up to a page multiple and
// charged as such. A null budget counts nothing: for buffers that live for one call outside a model.
class Buffer {
 public:
  Buffer() = default;
  Buffer(std::shared_ptr<Budget> budget, std::size_t bytes, const std::string& what);
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  std::byte* data() const noexcept { return data_; }
  std::size_t size() const noexcept { return size_; }  // as asked for
  std::size_t charged_bytes() const noexcept { return mapped_; }
  std::span<std::byte> span() const noexcept { return {data_, size_}; }
  template <typename T>
  T* as() const noexcept {
    return reinterpret_cast<T*>(data_);
  }
  explicit operator bool() const noexcept { return data_ != nullptr; }

 private:
  void reset() noexcept;
  std::shared_ptr<Budget> budget_;
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
  std::size_t mapped_ = 0;
};

// A stretch of address space that takes memory as it is written, in huge pages where the system has them;
// charged to nobody.
class Reservation {
 public:
  Reservation() = default;
  Reservation(std::uint64_t bytes, const std::string& what);  // Error{budget} where the system gives none
  ~Reservation();
  Reservation(Reservation&& other) noexcept;
  Reservation& operator=(Reservation&& other) noexcept;

  std::byte* data() const noexcept { return data_; }
  // Gives the memory of whole pages back; they read as zeros again.
  void discard(std::size_t offset, std::size_t bytes) noexcept;

 private:
  std::byte* data_ = nullptr;
  std::byte* mapped_ = nullptr;
  std::size_t mapped_bytes_ = 0;
};

// A share of a budget that is promised without pages behind it; given back when it dies.
class Charge {
 public:
  Charge(std::shared_ptr<Budget> budget, std::uint64_t bytes, const std::string& what)
      : budget_(std::move(budget)), bytes_(bytes) {
    budget_->charge(bytes_, what);
  }
  ~Charge() { budget_->release(bytes_); }
  // Error{budget} where it grows past the limit.
  void resize(std::uint64_t bytes, const std::string& what) {
    if (bytes > bytes_) budget_->charge(bytes - bytes_, what);
    shrink(bytes);
    bytes_ = bytes;
  }
  void shrink(std::uint64_t bytes) noexcept {  // at most to `bytes`; never grows
    if (bytes >= bytes_) return;
    budget_->release(bytes_ - bytes);
    bytes_ = bytes;
  }
  Charge(const Charge&) = delete;
  Charge& operator=(const Charge&) = delete;

 private:
  const std::shared_ptr<Budget> budget_;
  std::uint64_t bytes_;
};

std::size_t page_size() noexcept;
constexpr std::size_t round_up(std::size_t n, std::size_t multiple) noexcept {
  return (n + multiple - 1) / multiple * multiple;
}

// Memory that this process may still take: the smaller of MemAvailable and what its cgroup (v1 or v2,
// every ancestor) leaves it, page cache that the kernel would drop not counted as taken. Every source is
// optional; 0 means that nothing could be read. `root` is where /proc and /sys are looked up (for tests).
std::uint64_t available_memory_bytes(const std::filesystem::path& root = "/");
// Gives the pages of the heap that are free back to the system, where the C library can.
void release_free_heap() noexcept;
// Anonymous resident bytes of this process (RssAnon); 0 where it cannot be read.
std::uint64_t anonymous_resident_bytes();

}  // namespace edgert
