// One io_uring: reads put into the kernel and their results taken out, without a library.
//
// Threads: made and destroyed by any thread, used by one; interrupt() may be called from any. Not for threads
// that take turns: the kernel delivers a result in the thread that submitted, and cancels what a thread that
// ends leaves. Ownership: the destinations of reads belong to the caller and must stay valid until the result
// is out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>

namespace edgert {

class Uring {
 public:
  // For up to `most` reads at a time. Makes one, since some kernels and sandboxes give a ring and then refuse
  // to read; Error{unsupported} says why where none can be used.
  explicit Uring(unsigned most);
  ~Uring();  // REQUIRES the result of every read to be out
  Uring(const Uring&) = delete;
  Uring& operator=(const Uring&) = delete;

  // How a read is begun: in place, as far as it can be without waiting, or by a thread of the kernel that
  // waits.
  enum class Begin { in_place, by_kernel_thread };

  // Adds a read that submit_and_wait() passes on. `tag` comes back with its result; at most 2^30 bytes are
  // read at once. REQUIRES fewer than `most` reads without a result, tag != 0.
  void push(int fd, std::span<std::byte> destination, std::uint64_t offset, Begin begin, std::uint64_t tag);

  // Passes on what was added, and waits for a result if there is none or for interrupt(). May return without
  // any. Returns 0 or an errno; in both cases some of what was added may be left to be passed on.
  int submit_and_wait();
  // Ends the wait in submit_and_wait(), or the next one.
  void interrupt() noexcept;

  struct Result {
    std::uint64_t tag;
    int value;  // bytes read, or an errno negated
  };
  std::optional<Result> pop();
  // Forgets the read that was added last and not passed on, if there is one; returns its tag.
  std::optional<std::uint64_t> take_back();

 private:
  struct Parts;
  std::unique_ptr<Parts> parts_;
};

}  // namespace edgert
