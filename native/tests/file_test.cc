#include "storage/file.h"

#include <sys/stat.h>

#include <filesystem>
#include <vector>

#include "storage_support.h"
#include "support.h"

using namespace edgert;
using namespace edgert::test;

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
