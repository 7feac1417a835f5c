// Strict JSON for manifests: UTF-8 text without duplicate keys, bounded depth and number of values, no
// extensions.
//
// Ownership: values own what they hold. Errors are Error{corrupt} with the file and the byte offset, or, for
// a value of the wrong kind, the path of keys to it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace edgert {

class Json {
 public:
  using Array = std::vector<Json>;
  using Object = std::vector<std::pair<std::string, Json>>;  // in the order of the text
  using Value = std::variant<std::nullptr_t, bool, std::int64_t, double, std::string, Array, Object>;

  static constexpr int kMaxDepth = 64;
  static constexpr std::size_t kMaxValues = 1 << 19;  // bounds memory: a value takes more than its text
  // `file` is named in errors.
  static Json parse(std::string_view text, std::string_view file);

  Json() = default;
  explicit Json(Value value) : value_(std::move(value)) {}
  const Value& value() const noexcept { return value_; }

 private:
  Value value_ = nullptr;
};

// The beginning of a text, for messages: at most 80 bytes of whole characters, control characters as '?'.
std::string excerpt(std::string_view text);

// One JSON value with the path that leads to it, so that every complaint has an address.
class JsonField {
 public:
  JsonField(const Json& json, std::string path) : json_(&json), path_(std::move(path)) {}

  const std::string& path() const noexcept { return path_; }
  bool is_null() const noexcept;
  bool as_bool() const;
  std::int64_t as_integer(std::int64_t minimum, std::int64_t maximum) const;
  double as_number() const;  // finite
  const std::string& as_string() const;
  std::size_t size() const;                       // of an array
  JsonField operator[](std::size_t index) const;  // REQUIRES index < size()
  const Json& json() const noexcept { return *json_; }

  [[noreturn]] void fail(const std::string& allowed) const;  // Error{corrupt}: path, found, allowed

 private:
  const Json* json_;
  std::string path_;
};

// An object whose keys are taken one by one; finish() refuses what was not taken.
class JsonObject {
 public:
  explicit JsonObject(const JsonField& field);
  JsonField take(std::string_view key);  // Error{corrupt} where the key is missing
  bool has(std::string_view key) const noexcept;
  void skip(std::string_view key) noexcept;  // a key that may be there and is not used here
  void finish() const;                       // Error{unsupported} naming a key left over
  const std::string& path() const noexcept { return path_; }

 private:
  const Json::Object* object_;
  std::vector<bool> taken_;
  std::string path_;
};

}  // namespace edgert
