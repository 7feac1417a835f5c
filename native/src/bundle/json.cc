#include "bundle/json.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "platform/error.h"

namespace edgert {
namespace {

class Parser {
 public:
  Parser(std::string_view text, std::string_view file) : text_(text), file_(file) {}

  Json document() {
    Json value = parse_value(0);
    skip_space();
    if (at_ != text_.size()) fail("nothing after the value");
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& allowed) const {
    const std::string found = at_ < text_.size()
                                  ? "byte " + std::to_string(static_cast<unsigned char>(text_[at_]))
                                  : std::string("the end of the text");
    throw Error(ErrorKind::corrupt, std::string(file_) + ": invalid JSON at offset " + std::to_string(at_) +
                                        ": found " + found + ", expected " + allowed);
  }

  void skip_space() {
    while (at_ < text_.size() &&
           (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r')) {
      ++at_;
    }
  }
  bool accept(char c) {
    if (at_ < text_.size() && text_[at_] == c) {
      ++at_;
      return true;
    }
    return false;
  }
  bool accept(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  Json parse_value(int depth) {
    if (depth > Json::kMaxDepth) fail("at most " + std::to_string(Json::kMaxDepth) + " levels of nesting");
    if (++values_ > Json::kMaxValues) fail("at most " + std::to_string(Json::kMaxValues) + " values");
    skip_space();
    if (accept('{')) return parse_object(depth);
    if (accept('[')) return parse_array(depth);
    if (at_ < text_.size() && text_[at_] == '"') return Json(parse_string());
    if (accept("true")) return Json(true);
    if (accept("false")) return Json(false);
    if (accept("null")) return Json(nullptr);
    return parse_number();
  }

  Json parse_object(int depth) {
    Json::Object object;
    skip_space();
    if (accept('}')) return Json(std::move(object));
    do {
      skip_space();
      std::string key = parse_string();
      skip_space();
      if (!accept(':')) fail("':'");
      object.emplace_back(std::move(key), parse_value(depth + 1));
      skip_space();
    } while (accept(','));
    if (!accept('}')) fail("',' or '}'");
    refuse_duplicates(object);
    return Json(std::move(object));
  }

  void refuse_duplicates(const Json::Object& object) const {
    std::vector<std::string_view> keys(object.size());
    std::transform(object.begin(), object.end(), keys.begin(),
                   [](const auto& e) -> std::string_view { return e.first; });
    std::sort(keys.begin(), keys.end());
    const auto twice = std::adjacent_find(keys.begin(), keys.end());
    if (twice != keys.end()) {
      throw Error(ErrorKind::corrupt, std::string(file_) + ": key '" + excerpt(*twice) +
                                          "' stands twice in the object that ends at offset " +
                                          std::to_string(at_));
    }
  }

  Json parse_array(int depth) {
    Json::Array array;
    skip_space();
    if (accept(']')) return Json(std::move(array));
    do {
      array.push_back(parse_value(depth + 1));
      skip_space();
    } while (accept(','));
    if (!accept(']')) fail("',' or ']'");
    return Json(std::move(array));
  }

  std::uint32_t hex4() {
    std::uint32_t code = 0;
    const auto end = text_.data() + std::min(at_ + 4, text_.size());
    const auto result = std::from_chars(text_.data() + at_, end, code, 16);
    if (result.ptr != text_.data() + at_ + 4) fail("four hexadecimal digits");
    at_ += 4;
    return code;
  }

  std::string parse_string() {
    if (!accept('"')) fail("a string");
    std::string out;
    while (true) {
      if (at_ >= text_.size()) fail("'\"'");
      const char c = text_[at_];
      if (static_cast<unsigned char>(c) < 0x20) fail("an escaped control character");
      if (static_cast<unsigned char>(c) >= 0x80) {
        append_character(out);
        continue;
      }
      ++at_;
      if (c == '"') return out;
      if (c == '\\') {
        append_escape(out);
      } else {
        out += c;
      }
    }
  }

  // One UTF-8 sequence of two to four bytes, in its shortest form and no surrogate.
  void append_character(std::string& out) {
    const auto lead = static_cast<unsigned char>(text_[at_]);
    const std::size_t length = lead >= 0xC2 && lead < 0xE0 ? 2 : lead >= 0xE0 && lead < 0xF0 ? 3 : 4;
    const std::string_view bytes = text_.substr(at_, length);
    std::uint32_t code = lead & (0xFFU >> (length + 1));
    for (const char byte : bytes.substr(1)) {
      if ((static_cast<unsigned char>(byte) & 0xC0) != 0x80) fail("UTF-8");
      code = code << 6 | (static_cast<unsigned char>(byte) & 0x3F);
    }
    const std::uint32_t smallest = length == 2 ? 0x80 : length == 3 ? 0x800 : 0x10000;
    const bool surrogate = code >= 0xD800 && code < 0xE000;
    if (lead < 0xC2 || lead > 0xF4 || bytes.size() != length || code < smallest || code > 0x10FFFF ||
        surrogate)
      fail("UTF-8");
    out += bytes;
    at_ += length;
  }

  void append_escape(std::string& out) {
    static constexpr std::string_view kNames = "\"\\/bfnrt";
    static constexpr std::string_view kValues = "\"\\/\b\f\n\r\t";
    if (at_ >= text_.size()) fail("an escape");
    const char c = text_[at_++];
    if (const auto i = kNames.find(c); i != std::string_view::npos) {
      out += kValues[i];
      return;
    }
    if (c != 'u') fail("a known escape");
    std::uint32_t code = hex4();
    if (code >= 0xD800 && code < 0xDC00) {
      if (!accept("\\u")) fail("the second half of a surrogate pair");
      const std::uint32_t low = hex4();
      if (low < 0xDC00 || low > 0xDFFF) fail("the second half of a surrogate pair");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    } else if (code >= 0xDC00 && code < 0xE000) {
      fail("a surrogate pair that begins with its first half");
    }
    append_utf8(out, code);
  }

  static void append_utf8(std::string& out, std::uint32_t code) {
    const auto put = [&out](std::uint32_t byte) { out += static_cast<char>(byte); };
    if (code < 0x80) {
      put(code);
    } else if (code < 0x800) {
      put(0xC0 | code >> 6);
      put(0x80 | (code & 0x3F));
    } else if (code < 0x10000) {
      put(0xE0 | code >> 12);
      put(0x80 | (code >> 6 & 0x3F));
      put(0x80 | (code & 0x3F));
    } else {
      put(0xF0 | code >> 18);
      put(0x80 | (code >> 12 & 0x3F));
      put(0x80 | (code >> 6 & 0x3F));
      put(0x80 | (code & 0x3F));
    }
  }

  std::size_t digits() {
    const std::size_t from = at_;
    while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') ++at_;
    return at_ - from;
  }

  Json parse_number() {
    const std::size_t from = at_;
    accept('-');
    const bool leading_zero = at_ < text_.size() && text_[at_] == '0';
    const std::size_t whole = digits();
    if (whole == 0 || (leading_zero && whole > 1)) fail("a value");
    bool integer = true;
    if (accept('.')) {
      integer = false;
      if (digits() == 0) fail("a digit");
    }
    if (accept('e') || accept('E')) {
      integer = false;
      if (!accept('-')) accept('+');
      if (digits() == 0) fail("a digit");
    }
    const char* begin = text_.data() + from;
    const char* end = text_.data() + at_;
    if (integer) {
      std::int64_t value = 0;
      if (std::from_chars(begin, end, value).ec == std::errc()) return Json(value);
    }
    double value = 0;
    if (std::from_chars(begin, end, value).ec != std::errc()) {
      at_ = from;
      fail("a number that a double can hold");
    }
    return Json(value);
  }

  std::string_view text_;
  std::string_view file_;
  std::size_t at_ = 0;
  std::size_t values_ = 0;
};

std::string describe(const Json& json) {
  struct Describe {
    std::string operator()(std::nullptr_t) const { return "null"; }
    std::string operator()(bool b) const { return b ? "true" : "false"; }
    std::string operator()(std::int64_t i) const { return std::to_string(i); }
    std::string operator()(double d) const { return std::to_string(d); }
    std::string operator()(const std::string& s) const { return "\"" + excerpt(s) + "\""; }
    std::string operator()(const Json::Array& a) const { return "an array of " + std::to_string(a.size()); }
    std::string operator()(const Json::Object& o) const {
      return "an object of " + std::to_string(o.size()) + " keys";
    }
  };
  return std::visit(Describe{}, json.value());
}

}  // namespace

std::string excerpt(std::string_view text) {
  constexpr std::size_t kBytes = 80;
  std::size_t end = std::min(text.size(), kBytes);
  while (end < text.size() && end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
  std::string out(text.substr(0, end));
  std::replace_if(
      out.begin(), out.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7F; }, '?');
  return end < text.size() ? out + "…" : out;
}

Json Json::parse(std::string_view text, std::string_view file) { return Parser(text, file).document(); }

void JsonField::fail(const std::string& allowed) const {
  throw Error(ErrorKind::corrupt, path_ + ": found " + describe(*json_) + ", expected " + allowed);
}

bool JsonField::is_null() const noexcept { return std::holds_alternative<std::nullptr_t>(json_->value()); }

bool JsonField::as_bool() const {
  if (const bool* b = std::get_if<bool>(&json_->value())) return *b;
  fail("true or false");
}

std::int64_t JsonField::as_integer(std::int64_t minimum, std::int64_t maximum) const {
  const auto* i = std::get_if<std::int64_t>(&json_->value());
  if (i == nullptr || *i < minimum || *i > maximum) {
    fail("an integer from " + std::to_string(minimum) + " to " + std::to_string(maximum));
  }
  return *i;
}

double JsonField::as_number() const {
  if (const auto* i = std::get_if<std::int64_t>(&json_->value())) return static_cast<double>(*i);
  if (const auto* d = std::get_if<double>(&json_->value()); d != nullptr && std::isfinite(*d)) return *d;
  fail("a number");
}

const std::string& JsonField::as_string() const {
  if (const auto* s = std::get_if<std::string>(&json_->value())) return *s;
  fail("a string");
}

std::size_t JsonField::size() const {
  if (const auto* a = std::get_if<Json::Array>(&json_->value())) return a->size();
  fail("an array");
}

JsonField JsonField::operator[](std::size_t index) const {
  return {std::get<Json::Array>(json_->value())[index], path_ + "[" + std::to_string(index) + "]"};
}

JsonObject::JsonObject(const JsonField& field)
    : object_(std::get_if<Json::Object>(&field.json().value())), path_(field.path()) {
  if (object_ == nullptr) field.fail("an object");
  taken_.resize(object_->size());
}

JsonField JsonObject::take(std::string_view key) {
  for (std::size_t i = 0; i < object_->size(); ++i) {
    if ((*object_)[i].first == key) {
      taken_[i] = true;
      return {(*object_)[i].second, path_ + "." + std::string(key)};
    }
  }
  throw Error(ErrorKind::corrupt, path_ + ": key '" + std::string(key) + "' is missing");
}

bool JsonObject::has(std::string_view key) const noexcept {
  return std::any_of(object_->begin(), object_->end(), [&](const auto& e) { return e.first == key; });
}

void JsonObject::skip(std::string_view key) noexcept {
  for (std::size_t i = 0; i < object_->size(); ++i) {
    if ((*object_)[i].first == key) taken_[i] = true;
  }
}

void JsonObject::finish() const {
  for (std::size_t i = 0; i < taken_.size(); ++i) {
    if (!taken_[i]) {
      throw Error(ErrorKind::unsupported,
                  path_ + ": key '" + excerpt((*object_)[i].first) +
                      "' is not known to this version of edgert; use a newer one or convert again");
    }
  }
}

}  // namespace edgert
