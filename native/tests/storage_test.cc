#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <vector>

#include "platform/memory.h"
#include "storage/reader.h"
#include "support.h"

using namespace edgert;
using edgert::test::contains;
using edgert::test::error_of;
using edgert::test::TemporaryDirectory;

namespace {

constexpr std::size_t kPage = File::kDirectAlignment;

// `n` bytes that tell their place.
std::string pattern(std::size_t n) {
  std::string text(n, '\0');
  for (std::size_t i = 0; i < n; ++i) text[i] = static_cast<char>(i * 31 + i / 251);
  return text;
}

Buffer pages(std::size_t bytes) {
  return Buffer(std::make_shared<Budget>(bytes + page_size()), bytes, "test");
}

std::string_view text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

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

}  // namespace

TEST_CASE("a file reads back what was written, at any offset, buffered") {
  TemporaryDirectory directory;
  const std::string content = pattern(3 * kPage + 100);
  const auto file = File::open(directory.write("data.bin", content), DirectIo::off);
  CHECK(file->bytes() == content.size());
  CHECK_FALSE(file->direct());
  std::vector<std::byte> out(5000);
  for (const std::uint64_t offset : {0u, 1u, 4095u, 7388u}) {
    CHECK(file->read(offset, out) == out.size());
    CHECK(text_of(out) == std::string_view(content).substr(offset, out.size()));
  }
  CHECK(file->read(0, {}) == 0);
}

TEST_CASE("a direct read returns the same bytes and refuses what is not aligned") {
  TemporaryDirectory directory;
  const std::string content = pattern(4 * kPage);
  const auto path = directory.write("data.bin", content);
  const auto file = File::open(path, DirectIo::automatic);
  Buffer buffer = pages(2 * kPage);
  file->read(kPage, buffer.span());
  CHECK(text_of(buffer.span()) == std::string_view(content).substr(kPage, 2 * kPage));
  if (!file->direct()) {  // this file system takes none: then `on` must say so
    CHECK(contains(error_of(ErrorKind::unsupported, [&] { File::open(path, DirectIo::on); }), "direct"));
    return;
  }
  CHECK(File::open(path, DirectIo::on)->direct());
  const auto refused = [&](std::uint64_t offset, std::span<std::byte> to) {
    CHECK(contains(error_of(ErrorKind::invalid_argument, [&] { file->read(offset, to); }), "aligned"));
  };
  refused(1, buffer.span());
  refused(0, buffer.span().first(100));
  refused(0, buffer.span().subspan(512, kPage));
}

TEST_CASE("a read past the end names the file and where it ends") {
  TemporaryDirectory directory;
  const auto path = directory.write("short.bin", pattern(kPage + 10));
  Buffer buffer = pages(2 * kPage);
  for (const auto direct : {DirectIo::off, DirectIo::automatic}) {
    const auto file = File::open(path, direct);
    const auto message = error_of(ErrorKind::corrupt, [&] { file->read(0, buffer.span()); });
    CHECK(contains(message, path.string()));
    CHECK(contains(message, "offset 4106"));
    error_of(ErrorKind::corrupt, [&] { file->read(16 * kPage, buffer.span()); });
    error_of(ErrorKind::corrupt, [&] { file->read(std::uint64_t{1} << 63, buffer.span()); });
  }
}

TEST_CASE("a file truncated between open and read is corrupt, not a crash") {
  TemporaryDirectory directory;
  const auto path = directory.write("cut.bin", pattern(4 * kPage));
  for (const auto direct : {DirectIo::off, DirectIo::automatic}) {
    std::filesystem::resize_file(path, 4 * kPage);
    const auto file = File::open(path, direct);
    std::filesystem::resize_file(path, kPage);
    Buffer buffer = pages(4 * kPage);
    CHECK(contains(error_of(ErrorKind::corrupt, [&] { file->read(0, buffer.span()); }), "offset 4096"));
  }
}

TEST_CASE("only regular files are opened, and nothing blocks") {
  TemporaryDirectory directory;
  const auto real = directory.write("real.bin", "x");
  const auto open = [](const std::filesystem::path& path) {
    return [path] { File::open(path, DirectIo::automatic); };
  };
  error_of(ErrorKind::not_found, open(directory.path() / "missing.bin"));
  error_of(ErrorKind::not_found, open(real / "below a file"));
  error_of(ErrorKind::corrupt, open(directory.path()));
  error_of(ErrorKind::corrupt, open("/dev/zero"));

  const auto link = directory.path() / "link.bin";
  std::filesystem::create_symlink(real, link);
  CHECK(contains(error_of(ErrorKind::corrupt, open(link)), "symbolic link"));

  const auto fifo = directory.path() / "fifo";
  REQUIRE(mkfifo(fifo.c_str(), 0600) == 0);
  CHECK(contains(error_of(ErrorKind::corrupt, open(fifo)), "not a regular file"));
}

TEST_CASE("a reader completes many queued reads, each with its own bytes") {
  TemporaryDirectory directory;
  const std::string content = pattern(64 * kPage);
  const auto file = File::open(directory.write("data.bin", content), DirectIo::automatic);
  Buffer buffer = pages(64 * kPage);
  Log log;
  const auto reader = make_pread_reader(4);
  CHECK(std::string(reader->name()) == "pread");
  for (std::size_t i = 0; i < 64; ++i) {
    const auto priority = i % 2 == 0 ? ReadPriority::demand : ReadPriority::prefetch;
    reader->submit({file, i * kPage, buffer.span().subspan(i * kPage, kPage), priority, log.expect("read")});
  }
  for (const auto& [label, failure] : log.wait_for(64)) CHECK(failure == "");
  CHECK(text_of(buffer.span()) == content);
}

TEST_CASE("a failed read completes with its error and harms no other") {
  TemporaryDirectory directory;
  const auto path = directory.write("data.bin", pattern(kPage));
  const auto file = File::open(path, DirectIo::automatic);
  Buffer buffer = pages(2 * kPage);
  Log log;
  const auto reader = make_pread_reader(1);
  reader->submit(
      {file, 8 * kPage, buffer.span().first(kPage), ReadPriority::demand, log.expect("past the end")});
  reader->submit({file, 0, buffer.span().last(kPage), ReadPriority::demand, log.expect("good")});
  const auto entries = log.wait_for(2);
  CHECK(entries[0].first == "past the end");
  CHECK(contains(entries[0].second, "failed: " + path.string() + ": offset 32768"));
  CHECK(entries[1].second == "");
}

TEST_CASE("every queued demand read goes before any prefetch read") {
  TemporaryDirectory directory;
  const auto file = File::open(directory.write("data.bin", pattern(kPage)), DirectIo::automatic);
  Buffer buffer = pages(kPage);
  Gate gate;
  Log log;
  const auto reader = make_pread_reader(1);
  const auto submit = [&](ReadPriority priority, std::function<void(std::exception_ptr)> done) {
    reader->submit({file, 0, buffer.span(), priority, std::move(done)});
  };
  submit(ReadPriority::demand, [&](std::exception_ptr) { gate.pass(); });
  submit(ReadPriority::prefetch, log.expect("prefetch 1"));
  submit(ReadPriority::demand, log.expect("demand 1"));
  submit(ReadPriority::prefetch, log.expect("prefetch 2"));
  submit(ReadPriority::demand, log.expect("demand 2"));
  gate.open();
  const auto entries = log.wait_for(4);
  const std::vector<std::string> order = {"demand 1", "demand 2", "prefetch 1", "prefetch 2"};
  for (std::size_t i = 0; i < 4; ++i) CHECK(entries[i].first == order[i]);
}

TEST_CASE("a destroyed reader finishes the read in flight and cancels the queued ones") {
  TemporaryDirectory directory;
  const auto path = directory.write("data.bin", pattern(kPage));
  const auto file = File::open(path, DirectIo::automatic);
  Buffer buffer = pages(2 * kPage);
  Gate in_flight, destroying;
  Log log;
  auto owner = make_pread_reader(2);
  Reader& reader = *owner;
  const auto submit = [&](ReadPriority priority, std::function<void(std::exception_ptr)> done) {
    const auto half =
        priority == ReadPriority::demand ? buffer.span().first(kPage) : buffer.span().last(kPage);
    reader.submit({file, 0, half, priority, std::move(done)});
  };
  // One thread stays in this completion until destruction has begun.
  reader.submit({file, 0, buffer.span().last(kPage), ReadPriority::demand, [&](std::exception_ptr failure) {
                   log.expect("in flight")(failure);
                   in_flight.open();
                   destroying.pass();
                   submit(ReadPriority::prefetch, log.expect("submitted by a completion"));
                 }});
  in_flight.pass();
  // The other one reads again and again, ahead of the prefetches, and is cancelled when destruction begins.
  std::function<void(std::exception_ptr)> again = [&](std::exception_ptr failure) {
    if (failure) return destroying.open();
    submit(ReadPriority::demand, again);
  };
  submit(ReadPriority::demand, again);
  submit(ReadPriority::prefetch, log.expect("queued 1"));
  submit(ReadPriority::prefetch, log.expect("queued 2"));
  owner.reset();

  const auto entries = log.wait_for(4);
  REQUIRE(entries.size() == 4);
  CHECK(entries[0].first == "in flight");
  CHECK(entries[0].second == "");
  for (std::size_t i = 1; i < 4; ++i) {
    CHECK(contains(entries[i].second, "cancelled: " + path.string() + ": offset 0"));
  }
}

TEST_CASE("a reader refuses a request that it could not complete") {
  const auto reader = make_pread_reader(1);
  error_of(ErrorKind::invalid_argument, [&] { reader->submit({}); });
  error_of(ErrorKind::invalid_argument, [] { make_pread_reader(0); });
  error_of(ErrorKind::invalid_argument, [] { make_pread_reader(257); });
}
