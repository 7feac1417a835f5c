#include "storage/reader.h"

#include <string>

#include "platform/error.h"

namespace edgert {

std::unique_ptr<Reader> make_reader(IoBackend backend, int depth) {
  if (depth < 1 || depth > 256) {
    throw Error(ErrorKind::invalid_argument,
                "reads in flight: found " + std::to_string(depth) + ", allowed 1 to 256");
  }
  if (backend != IoBackend::pread) {
    try {
      return make_uring_reader(depth);
    } catch (const Error& error) {
      if (backend == IoBackend::io_uring || error.kind() != ErrorKind::unsupported) throw;
    }
  }
  return make_pread_reader(depth);
}

}  // namespace edgert
