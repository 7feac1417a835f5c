// edgert::Error becomes the class of its kind in edgert.errors.

#include <string_view>

#include "bindings/bindings.h"
#include "platform/error.h"

namespace py = pybind11;

namespace edgert {

namespace {

const char* class_name(ErrorKind kind) noexcept {
  switch (kind) {
    case ErrorKind::not_found:
      return "NotFoundError";
    case ErrorKind::corrupt:
      return "CorruptError";
    case ErrorKind::unsupported:
      return "UnsupportedError";
    case ErrorKind::invalid_argument:
      return "InvalidArgumentError";
    case ErrorKind::io:
      return "StorageError";
    case ErrorKind::budget:
      return "BudgetError";
    case ErrorKind::cancelled:
      return "CancelledError";
  }
  return "EdgertError";
}

}  // namespace

void bind_errors(py::module_&) {
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      std::rethrow_exception(thrown);
    } catch (const Error& error) {
      // A message may quote a path or a name that is not UTF-8.
      const std::string_view text = error.what();
      const auto message = py::reinterpret_steal<py::object>(
          PyUnicode_DecodeUTF8(text.data(), static_cast<py::ssize_t>(text.size()), "backslashreplace"));
      PyErr_SetObject(py::module_::import("edgert.errors").attr(class_name(error.kind())).ptr(),
                      message.ptr());
    }
  });
}

}  // namespace edgert
