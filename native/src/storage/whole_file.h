// A file read from beginning to end, several reads in flight, its first bytes usable while the others arrive.
//
// Threads: one thread uses it; completions run on the reader's threads.
// Ownership: borrows the reader and the destination; none of its reads is under way once it is destroyed.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "storage/reader.h"

namespace edgert {

class WholeFile {
 public:
  // REQUIRES destination.size() == file->bytes(), and an aligned destination where the file is direct.
  WholeFile(std::shared_ptr<const File> file, Reader& reader, std::span<std::byte> destination);
  ~WholeFile();
  WholeFile(const WholeFile&) = delete;
  WholeFile& operator=(const WholeFile&) = delete;

  // Returns when the first `bytes` are there; throws what a read threw. `poll` is called now and then and may
  // throw; may be null.
  void wait_for(std::uint64_t bytes, const std::function<void()>& poll);

 private:
  void submit_next();  // with the lock held; may throw
  void complete(std::size_t piece, std::exception_ptr error) noexcept;

  const std::shared_ptr<const File> file_;
  Reader& reader_;
  const std::span<std::byte> destination_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<bool> arrived_;  // by piece
  std::size_t whole_ = 0;      // pieces that have arrived without a gap
  std::size_t submitted_ = 0;
  int in_flight_ = 0;
  bool stopping_ = false;
  std::exception_ptr failure_;
};

}  // namespace edgert
