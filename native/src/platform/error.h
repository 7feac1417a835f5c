// The one exception family of the native library.
//
// Contract: every failure of native code that a caller can meet is an Error. The message names the
// file, field or tensor, the byte offset where there is one, what was found, what is allowed and what
// to do. Errors are values: safe to copy to and rethrow on another thread.
#pragma once

#include <stdexcept>
#include <string>

namespace edgert {

enum class ErrorKind { not_found, corrupt, unsupported, invalid_argument, io, budget, cancelled };

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const noexcept { return kind_; }

 private:
  ErrorKind kind_;
};

}  // namespace edgert
