#include "json_mutator.h"

#include <charconv>
#include <iterator>
#include <limits>

#include "platform/error.h"

namespace edgert::fuzz {
namespace {

constexpr std::int64_t kIntegers[] = {0,
                                      1,
                                      -1,
                                      2,
                                      3,
                                      7,
                                      8,
                                      13,
                                      15,
                                      16,
                                      17,
                                      31,
                                      32,
                                      64,
                                      255,
                                      256,
                                      4095,
                                      4096,
                                      4097,
                                      16384,
                                      65535,
                                      1 << 20,
                                      1 << 24,
                                      1LL << 31,
                                      1LL << 32,
                                      1LL << 50,
                                      1LL << 60,
                                      std::numeric_limits<std::int64_t>::max(),
                                      std::numeric_limits<std::int64_t>::min()};
constexpr double kNumbers[] = {0.0, -0.0, 0.5, 1.0, -1.0, 1e-300, 1e300, 1e-6, 3.4e38, 3.5e38};
constexpr std::string_view kStrings[] = {"",
                                         "f32",
                                         "f16",
                                         "int8",
                                         "int4",
                                         "q4_k",
                                         "q6_k",
                                         "mxfp4",
                                         "../x",
                                         "/etc/passwd",
                                         "a/b",
                                         ".",
                                         "manifest.json",
                                         "softmax",
                                         "sigmoid",
                                         "attention",
                                         "moe",
                                         "dense",
                                         "half",
                                         "interleaved",
                                         "silu",
                                         "head",
                                         "dense.bin",
                                         "router",
                                         "embedding",
                                         "layers.0.attention.q",
                                         "ffffffffffffffff",
                                         "00000000000000000000000000000000"};

void write_string(const std::string& text, std::string& out) {
  static constexpr char kHex[] = "0123456789abcdef";
  out += '"';
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || c == '"' || c == '\\') {
      out += "\\u00";
      out += kHex[byte >> 4];
      out += kHex[byte & 15];
    } else {
      out += c;
    }
  }
  out += '"';
}

void write(const Json& json, std::string& out) {
  struct Visitor {
    std::string& out;
    void operator()(std::nullptr_t) const { out += "null"; }
    void operator()(bool value) const { out += value ? "true" : "false"; }
    void operator()(std::int64_t value) const { out += std::to_string(value); }
    void operator()(double value) const {
      char text[32];
      const auto end = std::to_chars(text, text + sizeof text, value, std::chars_format::scientific).ptr;
      out.append(text, end);
    }
    void operator()(const std::string& value) const { write_string(value, out); }
    void operator()(const Json::Array& values) const {
      out += '[';
      for (std::size_t i = 0; i < values.size(); ++i) {
        if (i != 0) out += ',';
        write(values[i], out);
      }
      out += ']';
    }
    void operator()(const Json::Object& members) const {
      out += '{';
      for (std::size_t i = 0; i < members.size(); ++i) {
        if (i != 0) out += ',';
        write_string(members[i].first, out);
        out += ':';
        write(members[i].second, out);
      }
      out += '}';
    }
  };
  std::visit(Visitor{out}, json.value());
}

// A document that can be changed: Json itself is read-only.
class Mutator {
 public:
  explicit Mutator(std::uint32_t seed) : random_(seed) {}

  Json mutate(const Json& document) {
    count(document);
    Json result = document;
    for (std::size_t round = 1 + below(4); round > 0; --round) {
      next_ = 0;
      result = rebuild(result, below(count_), document);
    }
    return result;
  }

 private:
  std::size_t below(std::size_t n) { return n == 0 ? 0 : random_() % n; }

  void count(const Json& json) {
    ++count_;
    if (const auto* array = std::get_if<Json::Array>(&json.value())) {
      for (const Json& value : *array) count(value);
    } else if (const auto* object = std::get_if<Json::Object>(&json.value())) {
      for (const auto& [key, value] : *object) count(value);
    }
  }

  // A copy of `json` in which value number `target` is another.
  Json rebuild(const Json& json, std::size_t target, const Json& document) {
    if (next_++ == target) return replaced(json, document);
    if (const auto* array = std::get_if<Json::Array>(&json.value())) {
      Json::Array values;
      for (const Json& value : *array) values.push_back(rebuild(value, target, document));
      return Json(std::move(values));
    }
    if (const auto* object = std::get_if<Json::Object>(&json.value())) {
      Json::Object members;
      for (const auto& [key, value] : *object) members.emplace_back(key, rebuild(value, target, document));
      return Json(std::move(members));
    }
    return json;
  }

  Json replaced(const Json& json, const Json& document) {
    if (const auto* integer = std::get_if<std::int64_t>(&json.value()); integer != nullptr && below(3) != 0) {
      return below(2) == 0 ? Json(kIntegers[below(std::size(kIntegers))]) : Json(nudged(*integer));
    }
    if (std::holds_alternative<Json::Array>(json.value()) && below(3) != 0) return shuffled(json);
    if (std::holds_alternative<Json::Object>(json.value()) && below(3) != 0) return reshaped(json);
    switch (below(8)) {
      case 0:
        return Json(nullptr);
      case 1:
        return Json(below(2) == 0);
      case 2:
        return Json(kNumbers[below(std::size(kNumbers))]);
      case 3:
        return Json(Json::Array{});
      case 4:
        return Json(Json::Object{});
      case 5:
        return pick(document);
      case 6:
        return Json(kIntegers[below(std::size(kIntegers))]);
      default:
        return Json(std::string(kStrings[below(std::size(kStrings))]));
    }
  }

  static std::int64_t wrapped(std::uint64_t value) { return static_cast<std::int64_t>(value); }
  std::int64_t nudged(std::int64_t value) {
    const auto bits = static_cast<std::uint64_t>(value);
    switch (below(4)) {
      case 0:
        return wrapped(bits + 1);
      case 1:
        return wrapped(bits - 1);
      case 2:
        return wrapped(bits * 2);
      default:
        return wrapped(bits ^ (std::uint64_t{1} << below(63)));
    }
  }

  Json shuffled(const Json& json) {
    Json::Array values = std::get<Json::Array>(json.value());
    if (values.empty()) return Json(Json::Array{Json(std::int64_t{0})});
    const std::size_t a = below(values.size());
    const std::size_t b = below(values.size());
    switch (below(3)) {
      case 0:
        std::swap(values[a], values[b]);
        break;
      case 1:
        values.push_back(values[a]);
        break;
      default:
        values.erase(values.begin() + static_cast<std::ptrdiff_t>(a));
    }
    return Json(std::move(values));
  }

  Json reshaped(const Json& json) {
    Json::Object members = std::get<Json::Object>(json.value());
    if (members.empty()) return Json(Json::Object{{"key", Json(nullptr)}});
    const std::size_t a = below(members.size());
    const std::size_t b = below(members.size());
    switch (below(4)) {
      case 0:
        std::swap(members[a].second, members[b].second);
        break;
      case 1:
        members.push_back(members[a]);  // a key that stands twice
        break;
      case 2:
        members[a].first += "_";
        break;
      default:
        members.erase(members.begin() + static_cast<std::ptrdiff_t>(a));
    }
    return Json(std::move(members));
  }

  // Some value of the document, to stand where another was.
  Json pick(const Json& document) {
    const Json* at = &document;
    while (below(6) != 0) {
      if (const auto* array = std::get_if<Json::Array>(&at->value()); array != nullptr && !array->empty()) {
        at = &(*array)[below(array->size())];
      } else if (const auto* object = std::get_if<Json::Object>(&at->value());
                 object != nullptr && !object->empty()) {
        at = &(*object)[below(object->size())].second;
      } else {
        break;
      }
    }
    return *at;
  }

  std::mt19937 random_;
  std::size_t count_ = 0;
  std::size_t next_ = 0;
};

std::string with_bytes_changed(std::string text, std::uint32_t seed) {
  std::mt19937 random(seed);
  for (std::size_t i = 1 + random() % 4; i > 0 && !text.empty(); --i) {
    const std::size_t at = random() % text.size();
    switch (random() % 3) {
      case 0:
        text[at] = static_cast<char>(random());
        break;
      case 1:
        text.erase(at, 1 + random() % 8);
        break;
      default:
        text.insert(at, text.substr(random() % text.size(), random() % 16));
    }
  }
  return text;
}

}  // namespace

std::string to_text(const Json& json) {
  std::string out;
  write(json, out);
  return out;
}

std::string mutate_json(std::string_view text, std::uint32_t seed) {
  if (seed % 8 == 0) return with_bytes_changed(std::string(text), seed);
  try {
    return to_text(Mutator(seed).mutate(Json::parse(text, "seed")));
  } catch (const Error&) {
    return with_bytes_changed(std::string(text), seed);
  }
}

}  // namespace edgert::fuzz
