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
#include <functional>
#include <memory>
#include <span>

#include "storage/file.h"

namespace edgert {

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
  // From any thread, at any time: so many reads in flight from now on, where a reader bounds them; those
  // under way go on. REQUIRES 1 <= depth <= the depth it was made with.
  virtual void set_depth(int /*depth*/) {}
};

enum class IoBackend { pread, io_uring };

// Whether this system lets io_uring be used; pread always is.
bool io_uring_works();

// A reader with up to `depth` reads in flight. io_uring: Error{unsupported} says why where it does not work.
// REQUIRES 1 <= depth <= 256.
std::unique_ptr<Reader> make_reader(IoBackend backend, int depth);

// The implementations, for make_reader; the same requirement.
std::unique_ptr<Reader> make_pread_reader(int depth);  // `depth` threads
std::unique_ptr<Reader> make_uring_reader(
    int depth);  // Error{unsupported} where the system lets no ring be used

}  // namespace edgert
