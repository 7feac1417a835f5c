// Regular files opened for reading, and the steps of a read: the one place of what a system's answer means.
//
// Threads: a File is constant and may be read from any thread. A FileRead belongs to one thread at a time.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>

namespace edgert {

enum class DirectIo { automatic, on, off };

// A regular file opened for reading. Never a symbolic link, FIFO or device: those are Error{corrupt}.
class File {
 public:
  // automatic: O_DIRECT where the file system takes it, else buffered without read-ahead.
  // on: Error{unsupported} where it does not take it.
  static std::shared_ptr<const File> open(const std::filesystem::path& path, DirectIo direct);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  const std::filesystem::path& path() const noexcept { return path_; }
  std::uint64_t bytes() const noexcept { return bytes_; }
  bool direct() const noexcept { return direct_; }
  int descriptor() const noexcept { return fd_; }  // for the steps of a FileRead

  // Fills `destination` from `offset`: EINTR and short reads are continued, the end of the file is
  // Error{corrupt}, another failure Error{io}; both name path and offset. A direct file REQUIRES
  // offset, size and address to be multiples of kDirectAlignment. A buffered file drops what it read
  // from the page cache. Returns the bytes read from storage (destination.size()).
  std::size_t read(std::uint64_t offset, std::span<std::byte> destination) const;

  static constexpr std::size_t kDirectAlignment = 4096;

 private:
  File(std::filesystem::path path, int fd, std::uint64_t bytes, bool direct);
  std::filesystem::path path_;
  int fd_;
  std::uint64_t bytes_;
  bool direct_;
};

// A read under way: what is to be asked of the system next, and what to make of its answers. Readers that
// wait for the system in their own way use it as File::read does, with the same results and errors.
class FileRead {
 public:
  // Error{invalid_argument} where a direct file cannot be asked for this. `file` must outlive the read.
  FileRead(const File& file, std::uint64_t offset, std::span<std::byte> destination);

  bool complete() const noexcept { return done_ == destination_.size(); }
  // REQUIRES !complete(). Error{corrupt} where nothing can follow: the system need not be asked.
  struct Step {
    std::span<std::byte> destination;
    off_t offset;
  };
  Step next() const;
  // The answer: bytes read, or an errno negated. Throws what File::read does; EINTR only repeats the step.
  void advance(ssize_t result);
  // To be called once complete: what was read through the page cache leaves it.
  void drop_cached() const noexcept;

 private:
  [[noreturn]] void fail_at_end() const;
  std::uint64_t position() const noexcept { return offset_ + done_; }
  const File& file_;
  const std::uint64_t offset_;
  const std::span<std::byte> destination_;
  std::size_t done_ = 0;
};

}  // namespace edgert
