// Asynchronous reads of files; knows nothing of what the bytes mean.
//
// Threads: submit() may be called from any thread. A completion runs on a thread of the reader, must
// not throw and must not block for long; it may submit.
// Ownership: the destination of a read belongs to the caller and must stay valid until its completion
// has run. Destroying a Reader waits for the reads in flight; those still queued complete as cancelled.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>

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

enum class ReadPriority { demand, prefetch };  // every queued demand read goes before any prefetch read

struct ReadRequest {
  std::shared_ptr<const File> file;
  std::uint64_t offset = 0;
  std::span<std::byte> destination;
  ReadPriority priority = ReadPriority::demand;
  std::function<void(std::exception_ptr)> done;  // null: the bytes are there
};

class Reader {
 public:
  virtual ~Reader() = default;
  virtual void submit(ReadRequest request) = 0;
  virtual const char* name() const noexcept = 0;
};

// `depth` threads calling pread. REQUIRES 1 <= depth <= 256.
std::unique_ptr<Reader> make_pread_reader(int depth);

}  // namespace edgert
