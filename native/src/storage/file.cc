#include "storage/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <limits>
#include <string>
#include <system_error>
#include <utility>

#include "platform/error.h"
#include "platform/memory.h"

namespace edgert {
namespace {

std::string reason(int error) { return std::generic_category().message(error); }

[[noreturn]] void fail_open(const std::filesystem::path& path, int error) {
  const std::string name = path.string();
  switch (error) {
    case ENOENT:
    case ENOTDIR:
      throw Error(ErrorKind::not_found, name + ": " + reason(error));
    case ELOOP:
      throw Error(ErrorKind::corrupt, name + ": is a symbolic link; only regular files are read");
    case ENXIO:  // a socket
      throw Error(ErrorKind::corrupt, name + ": is not a regular file");
    default:
      throw Error(ErrorKind::io, name + ": cannot be opened: " + reason(error));
  }
}

std::string at(const std::filesystem::path& path, std::uint64_t offset) {
  return path.string() + ": offset " + std::to_string(offset) + ": ";
}

// Some file systems take the flag and refuse the reads; some devices want a larger alignment.
bool reads_directly(int fd) {
  if (fcntl(fd, F_SETFL, O_DIRECT) != 0) return false;
  alignas(File::kDirectAlignment) std::byte block[File::kDirectAlignment];
  return pread(fd, block, sizeof block, 0) >= 0 || errno != EINVAL;
}

bool unaligned(std::uint64_t n) { return n % File::kDirectAlignment != 0; }

}  // namespace

File::File(std::filesystem::path path, int fd, std::uint64_t bytes, bool direct)
    : path_(std::move(path)), fd_(fd), bytes_(bytes), direct_(direct) {}

File::~File() { close(fd_); }

std::shared_ptr<const File> File::open(const std::filesystem::path& path, DirectIo direct) {
  // Non-blocking, so that opening a FIFO without a writer returns.
  const int fd = ::open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) fail_open(path, errno);
  const std::shared_ptr<File> file(new File(path, fd, 0, false));  // owns fd from here
  struct stat status;
  if (fstat(fd, &status) != 0)
    throw Error(ErrorKind::io, path.string() + ": cannot be examined: " + reason(errno));
  if (!S_ISREG(status.st_mode)) throw Error(ErrorKind::corrupt, path.string() + ": is not a regular file");
  file->bytes_ = static_cast<std::uint64_t>(status.st_size);
  file->direct_ = direct != DirectIo::off && reads_directly(fd);
  if (!file->direct_) {
    if (direct == DirectIo::on) {
      throw Error(ErrorKind::unsupported,
                  path.string() + ": its file system takes no direct reads; use direct_io auto or off");
    }
    fcntl(fd, F_SETFL, 0);
    posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
  }
  return file;
}

std::size_t File::read(std::uint64_t offset, std::span<std::byte> destination) const {
  FileRead read(*this, offset, destination);
  while (!read.complete()) {
    const auto [rest, at] = read.next();
    const ssize_t n = pread(fd_, rest.data(), rest.size(), at);
    read.advance(n < 0 ? -errno : n);
  }
  read.drop_cached();
  return destination.size();
}

FileRead::FileRead(const File& file, std::uint64_t offset, std::span<std::byte> destination)
    : file_(file), offset_(offset), destination_(destination) {
  if (file.direct() && (unaligned(offset) || unaligned(destination.size()) ||
                        unaligned(reinterpret_cast<std::uintptr_t>(destination.data())))) {
    throw Error(ErrorKind::invalid_argument,
                at(file.path(), offset) + "a direct read of " + std::to_string(destination.size()) +
                    " bytes is not aligned to " + std::to_string(File::kDirectAlignment));
  }
}

FileRead::Step FileRead::next() const {
  // No file has such an offset, and only at the end of a file does a direct read stop in between.
  const bool past_the_end = position() > static_cast<std::uint64_t>(std::numeric_limits<off_t>::max());
  if (past_the_end || (file_.direct() && unaligned(done_))) fail_at_end();
  return {destination_.subspan(done_), static_cast<off_t>(position())};
}

void FileRead::advance(ssize_t result) {
  if (result == -EINTR) return;
  if (result == 0) fail_at_end();
  if (result < 0) {
    throw Error(ErrorKind::io, at(file_.path(), position()) + "reading " +
                                   std::to_string(destination_.size() - done_) +
                                   " bytes failed: " + reason(static_cast<int>(-result)));
  }
  done_ += static_cast<std::size_t>(result);
}

void FileRead::drop_cached() const noexcept {
  if (file_.direct() || done_ == 0) return;  // no bytes would mean all to the end of the file
  const std::uint64_t begin = offset_ / page_size() * page_size();
  const std::uint64_t end = round_up(position(), page_size());
  posix_fadvise(file_.descriptor(), static_cast<off_t>(begin), static_cast<off_t>(end - begin),
                POSIX_FADV_DONTNEED);
}

void FileRead::fail_at_end() const {
  throw Error(ErrorKind::corrupt, at(file_.path(), position()) + "the file ends here, " +
                                      std::to_string(destination_.size() - done_) + " bytes too early");
}

}  // namespace edgert
