#include "storage/reader.h"

#include <string>

#include "platform/error.h"
#include "storage/uring.h"

namespace edgert {

bool io_uring_works() {
  try {
    Uring(1);
    return true;
  } catch (const Error&) {
    return false;
  }
}

std::unique_ptr<Reader> make_reader(IoBackend backend, int depth) {
  if (depth < 1 || depth > 256) {
    throw Error(ErrorKind::invalid_argument,
                "reads in flight: found " + std::to_string(depth) + ", allowed 1 to 256");
  }
  return backend == IoBackend::io_uring ? make_uring_reader(depth) : make_pread_reader(depth);
}

}  // namespace edgert
