#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <limits>
#include <system_error>
#include <utility>

#include "platform/error.h"
#include "platform/memory.h"
#include "storage/reader.h"

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
  file->direct_ = direct != DirectIo::off && fcntl(fd, F_SETFL, O_DIRECT) == 0;
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
  const auto unaligned = [](std::uint64_t n) { return n % kDirectAlignment != 0; };
  if (direct_ && (unaligned(offset) || unaligned(destination.size()) ||
                  unaligned(reinterpret_cast<std::uintptr_t>(destination.data())))) {
    throw Error(ErrorKind::invalid_argument,
                at(path_, offset) + "a direct read of " + std::to_string(destination.size()) +
                    " bytes is not aligned to " + std::to_string(kDirectAlignment));
  }
  std::size_t done = 0;
  while (done < destination.size()) {
    const std::uint64_t position = offset + done;
    ssize_t n = 0;  // an offset that no file can have is past the end as well
    if (position <= static_cast<std::uint64_t>(std::numeric_limits<off_t>::max()) &&
        !(direct_ && unaligned(done))) {
      n = pread(fd_, destination.data() + done, destination.size() - done, static_cast<off_t>(position));
    }
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      throw Error(ErrorKind::io, at(path_, position) + "reading " +
                                     std::to_string(destination.size() - done) +
                                     " bytes failed: " + reason(errno));
    }
    if (n == 0) {
      throw Error(ErrorKind::corrupt, at(path_, position) + "the file ends here, " +
                                          std::to_string(destination.size() - done) + " bytes too early");
    }
    done += static_cast<std::size_t>(n);
  }
  if (!direct_) {
    const std::uint64_t begin = offset / page_size() * page_size();
    const std::uint64_t end = round_up(offset + done, page_size());
    posix_fadvise(fd_, static_cast<off_t>(begin), static_cast<off_t>(end - begin), POSIX_FADV_DONTNEED);
  }
  return done;
}

}  // namespace edgert
