#include "storage/uring.h"

#if defined(__linux__) && __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#include <sys/syscall.h>
#endif

#include <string>

#include "platform/error.h"

namespace edgert {
namespace {

[[noreturn]] void unusable(const std::string& why) {
  throw Error(ErrorKind::unsupported,
              "io_backend: io_uring does not work here: " + why + "; use io_backend auto or pread");
}

}  // namespace
}  // namespace edgert

// Headers of 5.6 or later know the operation that is used here, and this name with it.
#if defined(IORING_FEAT_RW_CUR_POS) && defined(__NR_io_uring_setup)

#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <system_error>
#include <thread>

namespace edgert {
namespace {

[[noreturn]] void unusable(const std::string& why, int error) {
  unusable(why + ": " + std::generic_category().message(error));
}

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const noexcept { return fd_; }

 private:
  const int fd_;
};

// Memory that is shared with the kernel.
class Mapping {
 public:
  Mapping(int fd, std::size_t bytes, off_t what)
      : bytes_(bytes),
        data_(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, what)) {
    if (data_ == MAP_FAILED) unusable("its memory cannot be mapped", errno);
  }
  ~Mapping() { munmap(data_, bytes_); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  template <typename T>
  T* at(std::size_t offset) const noexcept {
    return reinterpret_cast<T*>(static_cast<std::byte*>(data_) + offset);
  }

 private:
  const std::size_t bytes_;
  void* const data_;
};

constexpr std::uint64_t kBell = 0;  // its tag

int set_up(unsigned entries, io_uring_params& parameters) {
  const long fd = syscall(__NR_io_uring_setup, entries, &parameters);
  if (fd < 0) {
    unusable("containers, seccomp, Android or the sysctl kernel.io_uring_disabled may forbid it", errno);
  }
  return static_cast<int>(fd);
}

std::size_t ring_bytes(const io_uring_params& p) {
  if ((p.features & IORING_FEAT_SINGLE_MMAP) == 0) unusable("the kernel is older than 5.6");
  return std::max(p.sq_off.array + p.sq_entries * sizeof(unsigned),
                  p.cq_off.cqes + p.cq_entries * sizeof(io_uring_cqe));
}

}  // namespace

// Of each ring, one side moves the tail and the other the head; both only grow and wrap around.
struct Uring::Parts {
  explicit Parts(unsigned entries)
      : bell(eventfd(1, EFD_CLOEXEC)),
        fd(set_up(entries, parameters)),
        rings(fd.get(), ring_bytes(parameters), IORING_OFF_SQ_RING),
        sqe_memory(fd.get(), parameters.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES),
        sqes(sqe_memory.at<io_uring_sqe>(0)),
        sq_mask(*rings.at<unsigned>(parameters.sq_off.ring_mask)),
        sq_head(*rings.at<unsigned>(parameters.sq_off.head)),
        sq_tail(*rings.at<unsigned>(parameters.sq_off.tail)),
        cqes(rings.at<io_uring_cqe>(parameters.cq_off.cqes)),
        cq_mask(*rings.at<unsigned>(parameters.cq_off.ring_mask)),
        cq_head(*rings.at<unsigned>(parameters.cq_off.head)),
        cq_tail(*rings.at<unsigned>(parameters.cq_off.tail)) {
    unsigned* const order = rings.at<unsigned>(parameters.sq_off.array);
    for (unsigned i = 0; i < parameters.sq_entries; ++i) order[i] = i;
  }

  unsigned left_to_submit() const noexcept {
    return sq_tail.load() - sq_head.load(std::memory_order_acquire);
  }

  void push(int file, std::span<std::byte> destination, std::uint64_t offset, Begin begin, std::uint64_t tag);
  int enter() const;
  std::optional<Result> pop();

  // A read of this is always in the ring, so that others can end the wait for a result. 1 to begin with: the
  // first read returns at once.
  const Descriptor bell;
  std::uint64_t heard = 0;
  bool listening = false;

  io_uring_params parameters{};
  const Descriptor fd;
  const Mapping rings;
  const Mapping sqe_memory;
  io_uring_sqe* const sqes;
  const unsigned sq_mask;
  const std::atomic_ref<unsigned> sq_head;  // the kernel's
  const std::atomic_ref<unsigned> sq_tail;
  const io_uring_cqe* const cqes;
  const unsigned cq_mask;
  const std::atomic_ref<unsigned> cq_head;
  const std::atomic_ref<unsigned> cq_tail;  // the kernel's
};

void Uring::Parts::push(int file, std::span<std::byte> destination, std::uint64_t offset, Begin begin,
                        std::uint64_t tag) {
  constexpr std::size_t kMostBytes = 1 << 30;  // the field has 32 bits
  const unsigned tail = sq_tail.load(std::memory_order_relaxed);
  io_uring_sqe& sqe = sqes[tail & sq_mask];
  sqe = {};
  sqe.opcode = IORING_OP_READ;
  sqe.flags = begin == Begin::by_kernel_thread ? IOSQE_ASYNC : 0;
  sqe.fd = file;
  sqe.off = offset;
  sqe.addr = reinterpret_cast<std::uintptr_t>(destination.data());
  sqe.len = static_cast<unsigned>(std::min(destination.size(), kMostBytes));
  sqe.user_data = tag;
  sq_tail.store(tail + 1, std::memory_order_release);
}

int Uring::Parts::enter() const {
  const long submitted = syscall(__NR_io_uring_enter, fd.get(), left_to_submit(), 1u, IORING_ENTER_GETEVENTS,
                                 nullptr, std::size_t{0});
  return submitted < 0 ? errno : 0;
}

std::optional<Uring::Result> Uring::Parts::pop() {
  const unsigned head = cq_head.load(std::memory_order_relaxed);
  if (head == cq_tail.load(std::memory_order_acquire)) return std::nullopt;
  const io_uring_cqe& cqe = cqes[head & cq_mask];
  const Result result{cqe.user_data, cqe.res};
  cq_head.store(head + 1, std::memory_order_release);
  if (result.tag == kBell) listening = false;
  return result;
}

Uring::Uring(unsigned most) : parts_(std::make_unique<Parts>(most + 1)) {
  std::optional<Result> first;
  while (!first) {
    const int error = submit_and_wait();
    if (error != 0 && error != EINTR) unusable("a read through it was refused", error);
    first = parts_->pop();
  }
  if (first->value < 0) unusable("a read through it failed", -first->value);
}

Uring::~Uring() {
  while (parts_->listening) {  // the kernel would write to memory that is gone
    interrupt();
    if (parts_->enter() != 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    while (parts_->pop()) {
    }
  }
}

void Uring::push(int fd, std::span<std::byte> destination, std::uint64_t offset, Begin begin,
                 std::uint64_t tag) {
  parts_->push(fd, destination, offset, begin, tag);
}

int Uring::submit_and_wait() {
  if (!parts_->listening) {
    parts_->push(parts_->bell.get(), std::as_writable_bytes(std::span(&parts_->heard, 1)), 0, Begin::in_place,
                 kBell);
    parts_->listening = true;
  }
  return parts_->enter();
}

void Uring::interrupt() noexcept { eventfd_write(parts_->bell.get(), 1); }

std::optional<Uring::Result> Uring::pop() {
  for (;;) {
    const auto result = parts_->pop();
    if (!result || result->tag != kBell) return result;
  }
}

std::optional<std::uint64_t> Uring::take_back() {
  while (parts_->left_to_submit() != 0) {
    const unsigned tail = parts_->sq_tail.load(std::memory_order_relaxed) - 1;
    parts_->sq_tail.store(tail, std::memory_order_release);
    const std::uint64_t tag = parts_->sqes[tail & parts_->sq_mask].user_data;
    if (tag != kBell) return tag;
    parts_->listening = false;
  }
  return std::nullopt;
}

}  // namespace edgert

#else

namespace edgert {

struct Uring::Parts {};
Uring::Uring(unsigned) { unusable("this build has none"); }
Uring::~Uring() = default;
void Uring::push(int, std::span<std::byte>, std::uint64_t, Begin, std::uint64_t) {}
int Uring::submit_and_wait() { return 0; }
void Uring::interrupt() noexcept {}
std::optional<Uring::Result> Uring::pop() { return std::nullopt; }
std::optional<std::uint64_t> Uring::take_back() { return std::nullopt; }

}  // namespace edgert

#endif
