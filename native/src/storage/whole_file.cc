#include "storage/whole_file.h"

#include <algorithm>
#include <chrono>
#include <utility>

namespace edgert {
namespace {

constexpr std::size_t kPiece = 4 << 20;
constexpr std::size_t kReads = 16;  // in flight, so that 64 MiB are asked for: enough for any disk
constexpr auto kPollInterval = std::chrono::milliseconds(20);

}  // namespace

WholeFile::WholeFile(std::shared_ptr<const File> file, Reader& reader, std::span<std::byte> destination)
    : file_(std::move(file)),
      reader_(reader),
      destination_(destination),
      arrived_((destination.size() + kPiece - 1) / kPiece) {
  const std::lock_guard lock(mutex_);
  try {
    for (std::size_t i = 0; i < std::min(kReads, arrived_.size()); ++i) submit_next();
  } catch (...) {
    failure_ = std::current_exception();  // for wait_for() to report, once the others have ended
  }
}

WholeFile::~WholeFile() {
  std::unique_lock lock(mutex_);
  stopping_ = true;
  changed_.wait(lock, [&] { return in_flight_ == 0; });
}

void WholeFile::submit_next() {
  const std::size_t piece = submitted_;
  const std::size_t from = piece * kPiece;
  reader_.submit({file_, from, destination_.subspan(from, std::min(kPiece, destination_.size() - from)),
                  ReadPriority::demand,
                  [this, piece](std::exception_ptr error) { complete(piece, std::move(error)); }});
  ++submitted_;
  ++in_flight_;
}

void WholeFile::complete(std::size_t piece, std::exception_ptr error) noexcept {
  const std::lock_guard lock(mutex_);
  --in_flight_;
  try {
    if (error) std::rethrow_exception(error);
    arrived_[piece] = true;
    while (whole_ < arrived_.size() && arrived_[whole_]) ++whole_;
    if (!stopping_ && !failure_ && submitted_ < arrived_.size()) submit_next();
  } catch (...) {
    if (!failure_) failure_ = std::current_exception();
  }
  changed_.notify_all();
}

void WholeFile::wait_for(std::uint64_t bytes, const std::function<void()>& poll) {
  if (poll) poll();
  std::unique_lock lock(mutex_);
  while (whole_ * kPiece < bytes) {
    if (failure_) std::rethrow_exception(failure_);
    changed_.wait_for(lock, kPollInterval);
    if (!poll) continue;
    lock.unlock();
    poll();
    lock.lock();
  }
}

}  // namespace edgert
