#include "storage/reader.h"

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstddef>
#include <iterator>
#include <mutex>
#include <thread>
#include <vector>

#include "storage_support.h"
#include "support.h"

using namespace edgert;
using namespace edgert::test;

namespace {

// Holds a reader's thread in a completion until it is opened.
class Gate {
 public:
  void pass() {
    std::unique_lock lock(mutex_);
    open_.wait(lock, [&] { return is_open_; });
  }
  void open() {
    std::lock_guard lock(mutex_);
    is_open_ = true;
    open_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable open_;
  bool is_open_ = false;
};

// Completions in the order in which they came: a label and what went wrong, "" for nothing.
class Log {
 public:
  std::function<void(std::exception_ptr)> expect(std::string label) {
    return [this, label = std::move(label)](std::exception_ptr failure) {
      std::string what;
      try {
        if (failure) std::rethrow_exception(failure);
      } catch (const Error& error) {
        what =
            (error.kind() == ErrorKind::cancelled ? "cancelled: " : "failed: ") + std::string(error.what());
      }
      std::lock_guard lock(mutex_);
      entries_.emplace_back(label, what);
      changed_.notify_all();
    };
  }
  std::vector<std::pair<std::string, std::string>> wait_for(std::size_t n) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return entries_.size() >= n; });
    return entries_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::pair<std::string, std::string>> entries_;
};

// Those that this system lets run.
std::vector<IoBackend> usable_backends() {
  std::vector<IoBackend> usable = {IoBackend::pread};
  try {
    make_reader(IoBackend::io_uring, 1);
    usable.push_back(IoBackend::io_uring);
  } catch (const Error& error) {
    MESSAGE("SKIPPED for io_uring: " << std::string(error.what()));
  }
  return usable;
}

// Memory that nobody may touch.
class Mapping {
 public:
  explicit Mapping(std::size_t bytes)
      : bytes_(bytes), data_(mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    REQUIRE(data_ != MAP_FAILED);
  }
  ~Mapping() { munmap(data_, bytes_); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  std::span<std::byte> span() const { return {static_cast<std::byte*>(data_), bytes_}; }

 private:
  const std::size_t bytes_;
  void* const data_;
};

std::size_t cached_pages(const File& file) {
  void* const data = mmap(nullptr, file.bytes(), PROT_READ, MAP_SHARED, file.descriptor(), 0);
  REQUIRE(data != MAP_FAILED);
  std::vector<unsigned char> present(round_up(file.bytes(), page_size()) / page_size());
  REQUIRE(mincore(data, file.bytes(), present.data()) == 0);
  munmap(data, file.bytes());
  return static_cast<std::size_t>(std::count_if(present.begin(), present.end(), [](int c) { return c & 1; }));
}

// From here on this thread, and those that it starts, may not make this system call.
bool forbid(int call) {
  sock_filter program[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<unsigned>(call), 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog filter = {std::size(program), program};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter, 0, 0) == 0;
}

}  // namespace

TEST_CASE("a reader completes many queued reads, each with its own bytes") {
  TemporaryDirectory directory;
  const std::string content = pattern(64 * kPage);
  const auto path = directory.write("data.bin", content);
  for (const IoBackend backend : usable_backends()) {
    for (const auto direct : {DirectIo::off, DirectIo::automatic}) {
      const auto file = File::open(path, direct);
      Buffer buffer = pages(64 * kPage);
      Log log;
      const auto reader = make_reader(backend, 4);
      for (std::size_t i = 0; i < 64; ++i) {
        const auto priority = i % 2 == 0 ? ReadPriority::demand : ReadPriority::prefetch;
        const auto place = buffer.span().subspan(i * kPage, kPage);
        reader->submit({file, i * kPage, place, priority, log.expect("read")});
      }
      for (const auto& [label, failure] : log.wait_for(64)) CHECK(failure == "");
      CHECK(text_of(buffer.span()) == content);
    }
  }
}

TEST_CASE("several threads submit at once, and completions submit again") {
  TemporaryDirectory directory;
  const std::string content = pattern(16 * kPage);
  const auto file = File::open(directory.write("data.bin", content), DirectIo::automatic);
  for (const IoBackend backend : usable_backends()) {
    constexpr int kThreads = 3;
    Buffer buffer = pages(kThreads * 16 * kPage);
    Log log;
    const auto reader = make_reader(backend, 2);
    std::function<void(std::size_t, std::size_t)> read_on = [&](std::size_t chain, std::size_t page) {
      const auto place = buffer.span().subspan((chain * 16 + page) * kPage, kPage);
      const auto next = [&, chain, page, end = log.expect("end of a chain")](std::exception_ptr failure) {
        failure || page == 15 ? end(failure) : read_on(chain, page + 1);
      };
      reader->submit({file, page * kPage, place, ReadPriority::demand, next});
    };
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < kThreads; ++i) threads.emplace_back([&, i] { read_on(i, 0); });
    for (auto& thread : threads) thread.join();
    for (const auto& [label, failure] : log.wait_for(kThreads)) CHECK(failure == "");
    CHECK(text_of(buffer.span()) == content + content + content);
  }
}

TEST_CASE("a failed read completes with the error of File::read and harms no other") {
  TemporaryDirectory directory;
  const auto path = directory.write("cut.bin", pattern(4 * kPage));
  const Mapping unreadable(kPage);
  for (const IoBackend backend : usable_backends()) {
    for (const auto direct : {DirectIo::off, DirectIo::automatic}) {
      std::filesystem::resize_file(path, 4 * kPage);
      const auto file = File::open(path, direct);
      std::filesystem::resize_file(path, 3 * kPage - 10);
      Buffer buffer = pages(4 * kPage);
      Log log;
      const auto reader = make_reader(backend, 1);
      std::vector<std::string> messages;
      const auto submit = [&](ErrorKind kind, std::uint64_t offset, std::span<std::byte> to) {
        messages.push_back(error_of(kind, [&] { file->read(offset, to); }));
        reader->submit({file, offset, to, ReadPriority::demand, log.expect("bad")});
      };
      submit(ErrorKind::corrupt, 0, buffer.span());
      submit(ErrorKind::corrupt, 8 * kPage, buffer.span());
      submit(ErrorKind::corrupt, std::uint64_t{1} << 63, buffer.span());
      submit(ErrorKind::io, 0, unreadable.span());
      if (file->direct()) submit(ErrorKind::invalid_argument, 1, buffer.span());
      reader->submit({file, 0, buffer.span().first(2 * kPage), ReadPriority::demand, log.expect("good")});
      const auto entries = log.wait_for(messages.size() + 1);
      for (std::size_t i = 0; i < messages.size(); ++i) CHECK(entries[i].second == "failed: " + messages[i]);
      CHECK(entries.back() == std::pair<std::string, std::string>("good", ""));
    }
  }
}

TEST_CASE("what is read through the page cache leaves it, whoever reads") {
  TemporaryDirectory directory;
  const auto path = directory.write("data.bin", pattern(64 * kPage));
  const auto file = File::open(path, DirectIo::off);
  fsync(file->descriptor());  // only clean pages can leave
  Buffer buffer = pages(64 * kPage);
  const std::size_t written = cached_pages(*file);
  file->read(0, {});
  CHECK(cached_pages(*file) == written);
  file->read(0, buffer.span());
  const std::size_t after_file_read = cached_pages(*file);
  if (after_file_read != 0) MESSAGE("this file system keeps its pages");
  for (const IoBackend backend : usable_backends()) {
    Log log;
    const auto reader = make_reader(backend, 2);
    reader->submit({file, 0, buffer.span(), ReadPriority::demand, log.expect("read")});
    log.wait_for(1);
    CHECK(cached_pages(*file) == after_file_read);
  }
}

TEST_CASE("every queued demand read goes before any prefetch read") {
  TemporaryDirectory directory;
  const auto file = File::open(directory.write("data.bin", pattern(kPage)), DirectIo::automatic);
  Buffer buffer = pages(kPage);
  for (const IoBackend backend : usable_backends()) {
    Gate entered, gate;
    Log log;
    const auto reader = make_reader(backend, 1);
    const auto submit = [&](ReadPriority priority, std::function<void(std::exception_ptr)> done) {
      reader->submit({file, 0, buffer.span(), priority, std::move(done)});
    };
    submit(ReadPriority::demand, [&](std::exception_ptr) {
      entered.open();
      gate.pass();
    });
    entered.pass();
    submit(ReadPriority::demand, log.expect("demand 0"));  // may be read during that completion
    submit(ReadPriority::prefetch, log.expect("prefetch 1"));
    submit(ReadPriority::demand, log.expect("demand 1"));
    submit(ReadPriority::prefetch, log.expect("prefetch 2"));
    submit(ReadPriority::demand, log.expect("demand 2"));
    gate.open();
    const auto entries = log.wait_for(5);
    const std::vector<std::string> order = {"demand 0", "demand 1", "demand 2", "prefetch 1", "prefetch 2"};
    for (std::size_t i = 0; i < order.size(); ++i) CHECK(entries[i].first == order[i]);
  }
}

TEST_CASE("a destroyed reader finishes the read in flight and cancels the queued ones") {
  TemporaryDirectory directory;
  const auto path = directory.write("data.bin", pattern(kPage));
  const auto file = File::open(path, DirectIo::automatic);
  for (const IoBackend backend : usable_backends()) {
    constexpr std::size_t kChains = 8;  // more than go on beside each other with two reads in flight
    Buffer buffer = pages((kChains + 1) * kPage);
    Gate in_flight, destroying;
    Log log;
    auto owner = make_reader(backend, 2);
    Reader& reader = *owner;
    const auto submit = [&](std::size_t page, ReadPriority priority,
                            std::function<void(std::exception_ptr)> done) {
      reader.submit({file, 0, buffer.span().subspan(page * kPage, kPage), priority, std::move(done)});
    };
    // One thread stays in this completion until destruction has begun.
    submit(kChains, ReadPriority::demand, [&](std::exception_ptr failure) {
      log.expect("in flight")(failure);
      in_flight.open();
      destroying.pass();
      submit(kChains, ReadPriority::prefetch, log.expect("submitted by a completion"));
    });
    in_flight.pass();
    // These are read again and again, ahead of the prefetches, and cancelled when destruction begins.
    std::function<void(std::size_t, std::exception_ptr)> again = [&](std::size_t page,
                                                                     std::exception_ptr failure) {
      if (failure) return destroying.open();
      submit(page, ReadPriority::demand, [&again, page](std::exception_ptr f) { again(page, f); });
    };
    for (std::size_t page = 0; page < kChains; ++page) again(page, nullptr);
    submit(kChains, ReadPriority::prefetch, log.expect("queued 1"));
    submit(kChains, ReadPriority::prefetch, log.expect("queued 2"));
    owner.reset();

    const auto entries = log.wait_for(4);
    REQUIRE(entries.size() == 4);
    CHECK(entries[0].first == "in flight");
    CHECK(entries[0].second == "");
    for (std::size_t i = 1; i < 4; ++i) {
      CHECK(contains(entries[i].second, "cancelled: " + path.string() + ": offset 0"));
    }
  }
}

TEST_CASE("a reader destroyed with many reads under way completes each once, and none afterwards") {
  TemporaryDirectory directory;
  const auto path = directory.write("data.bin", pattern(256 * kPage));
  for (const IoBackend backend : usable_backends()) {
    for (const auto direct : {DirectIo::off, DirectIo::automatic}) {
      const auto file = File::open(path, direct);
      Buffer buffer = pages(256 * kPage);
      std::atomic<int> completions = 0;
      {
        const auto reader = make_reader(backend, 8);
        for (std::size_t i = 0; i < 64; ++i) {
          reader->submit({file, i * 4 * kPage, buffer.span().subspan(i * 4 * kPage, 4 * kPage),
                          ReadPriority::demand, [&](std::exception_ptr) { ++completions; }});
        }
      }
      CHECK(completions == 64);
    }
  }
}

TEST_CASE("a reader refuses a request that it could not complete") {
  for (const IoBackend backend : usable_backends()) {
    const auto reader = make_reader(backend, 1);
    error_of(ErrorKind::invalid_argument, [&] { reader->submit({}); });
  }
  for (const int depth : {0, 257}) {
    CHECK(contains(error_of(ErrorKind::invalid_argument, [&] { make_reader(IoBackend::pread, depth); }),
                   "1 to 256"));
  }
}

TEST_CASE("the backend is the one asked for") {
  CHECK(std::string(make_reader(IoBackend::pread, 1)->name()) == "pread");
  const bool both = usable_backends().size() == 2;
  CHECK(io_uring_works() == both);
  if (both) CHECK(std::string(make_reader(IoBackend::io_uring, 256)->name()) == "io_uring");
}

TEST_CASE("where the system forbids io_uring, asking for it says so") {
  for (const int call : {__NR_io_uring_setup, __NR_io_uring_enter}) {
    std::thread([&] {
      if (!forbid(call)) MESSAGE("seccomp is not to be had: the system must forbid io_uring itself");
      CHECK_FALSE(io_uring_works());
      const auto message = error_of(ErrorKind::unsupported, [] { make_reader(IoBackend::io_uring, 2); });
      CHECK(contains(message, "io_uring does not work here"));
      CHECK(contains(message, "use io_backend auto or pread"));
    }).join();
  }
}
