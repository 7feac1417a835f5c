// Memory that Python lends through the buffer protocol: bytes, memoryview, mmap, numpy arrays.
//
// Threads: made and destroyed with the GIL held; the bytes may be used without it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <span>
#include <string>

#include "platform/error.h"

namespace edgert {

class BorrowedBuffer {
 public:
  enum class Access { read, write };
  // Error{invalid_argument} naming `what` unless it is one contiguous piece, writable where asked.
  BorrowedBuffer(const pybind11::object& object, const char* what, Access access = Access::read) {
    const bool write = access == Access::write;
    if (PyObject_GetBuffer(object.ptr(), &view_, write ? PyBUF_CONTIG : PyBUF_CONTIG_RO) == 0) return;
    PyErr_Clear();
    throw Error(ErrorKind::invalid_argument,
                std::string(what) + ": needed is a contiguous" + (write ? " writable" : "") +
                    " buffer, found " +
                    pybind11::str(pybind11::type::handle_of(object).attr("__name__")).cast<std::string>());
  }
  ~BorrowedBuffer() { PyBuffer_Release(&view_); }
  BorrowedBuffer(const BorrowedBuffer&) = delete;
  BorrowedBuffer& operator=(const BorrowedBuffer&) = delete;

  std::span<const std::byte> bytes() const noexcept { return as<const std::byte>(); }
  template <typename T>
  std::span<T> as() const noexcept {
    return {static_cast<T*>(view_.buf), static_cast<std::size_t>(view_.len) / sizeof(T)};
  }

 private:
  Py_buffer view_{};
};

}  // namespace edgert
