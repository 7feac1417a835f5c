// Reads that wait for something, in the order in which they go on: demand before prefetch, else first in,
// first out.
//
// Threads: none of its own; readers guard it by a lock.
// Ownership: owns its reads. They move between queues without being copied or allocated.
#pragma once

#include <exception>
#include <list>
#include <optional>
#include <string>
#include <utility>

#include "platform/error.h"
#include "storage/reader.h"

namespace edgert {

struct QueuedRead {
  ReadRequest request;
  std::optional<FileRead> steps;  // once it has begun, where its reader takes them one by one
  bool may_wait = false;          // likewise: the system may wait in the midst of it
  std::exception_ptr failure;

  void cancel() {
    failure = std::make_exception_ptr(
        Error(ErrorKind::cancelled, request.file->path().string() + ": offset " +
                                        std::to_string(request.offset) + ": the reader closed first"));
  }
};

class ReadQueue {
 public:
  using Reads = std::list<QueuedRead>;

  // The read of a request that can be completed, as a list of one. Error{invalid_argument} for another.
  static Reads accept(ReadRequest request) {
    if (!request.file || !request.done) {
      throw Error(ErrorKind::invalid_argument, "a read needs a file and a completion");
    }
    Reads one;
    one.push_back({std::move(request), std::nullopt, false, nullptr});
    return one;
  }

  bool empty() const noexcept { return demand_.empty() && prefetch_.empty(); }
  std::size_t size() const noexcept { return demand_.size() + prefetch_.size(); }

  // Moves `read`, which is in `from`.
  void push(Reads& from, Reads::iterator read) noexcept {
    Reads& reads = read->request.priority == ReadPriority::demand ? demand_ : prefetch_;
    reads.splice(reads.end(), from, read);
  }

  // Moves the next one to the end of `to`. REQUIRES !empty().
  Reads::iterator pop(Reads& to) noexcept {
    Reads& reads = demand_.empty() ? prefetch_ : demand_;
    const auto read = reads.begin();
    to.splice(to.end(), reads, read);
    return read;
  }

 private:
  Reads demand_;
  Reads prefetch_;
};

}  // namespace edgert
