#include "bundle/json.h"

#include "support.h"

using namespace edgert;
using test::contains;
using test::error_of;

namespace {
Json parse(std::string_view text) { return Json::parse(text, "file"); }
std::string corrupt(std::string_view text) {
  return error_of(ErrorKind::corrupt, [&] { parse(text); });
}
}  // namespace

TEST_CASE("values of every kind are read") {
  const Json json = parse(R"( {"a": [1, -2.5e3, true, false, null], "b": {"c": "x\n\u00e9\ud83d\ude00"}} )");
  JsonObject root(JsonField(json, "file"));
  const JsonField a = root.take("a");
  CHECK(a.size() == 5);
  CHECK(a[0].as_integer(0, 9) == 1);
  CHECK(a[1].as_number() == -2500);
  CHECK(a[2].as_bool());
  CHECK(a[4].is_null());
  JsonObject b(root.take("b"));
  CHECK(b.take("c").as_string() == "x\n\xc3\xa9\xf0\x9f\x98\x80");
  root.finish();
}

TEST_CASE("malformed text is refused with its offset") {
  CHECK(contains(corrupt(R"({"a": 1,})"), "offset 8"));
  CHECK(contains(corrupt("[1 2]"), "offset 3"));
  for (const char* text : {"", "{", "[", "\"", "\"\\x\"", "\"\\ud800\"", "\"\\udc00\"", "01", "1.", "1e", "-",
                           "nul", "[1]x", "\"\t\"", "1e999", "{\"a\" 1}", "{1: 2}"}) {
    CAPTURE(text);
    CHECK(contains(corrupt(text), "file: invalid JSON at offset"));
  }
}

TEST_CASE("text is UTF-8, each character in its one form") {
  for (const char* text : {"\"\x7f\"", "\"\xc2\x80\"", "\"\xe0\xa0\x80\"", "\"\xed\x9f\xbf\"",
                           "\"\xf0\x90\x80\x80\"", "\"\xf4\x8f\xbf\xbf\""}) {
    const Json json = parse(text);
    CHECK(JsonField(json, "file").as_string() ==
          std::string_view(text).substr(1, std::string_view(text).size() - 2));
  }
  // Alone, cut short, too long for what it holds, a surrogate, past the last code point, no lead byte.
  for (const char* text :
       {"\"\x80\"", "\"\xc3\"", "\"\xc3", "\"\xc1\xbf\"", "\"\xe0\x9f\xbf\"", "\"\xf0\x8f\xbf\xbf\"",
        "\"\xed\xa0\x80\"", "\"\xf4\x90\x80\x80\"", "\"\xf5\x80\x80\x80\"", "\"\xff\""}) {
    CHECK(contains(corrupt(text), "expected UTF-8"));
  }
}

TEST_CASE("a key that stands twice is refused by name") {
  CHECK(contains(corrupt(R"({"a":1,"b":2,"a":3})"), "'a'"));
}

TEST_CASE("nesting is bounded") {
  CHECK_NOTHROW(parse(std::string(60, '[') + std::string(60, ']')));
  CHECK(contains(corrupt(std::string(100000, '[')), "64 levels"));
}

TEST_CASE("the number of values is bounded, and with it the memory that a text can take") {
  std::string text = "[0";
  for (std::size_t i = 0; i < Json::kMaxValues; ++i) text += ",0";
  CHECK(contains(corrupt(text + "]"), "524288 values"));
}

TEST_CASE("messages quote the beginning of a text, in whole characters") {
  CHECK(excerpt("short") == "short");
  CHECK(excerpt("a\033[2J\n") == "a?[2J?");
  CHECK(excerpt(std::string(79, 'x') + "\xc3\xa9") == std::string(79, 'x') + "…");
  CHECK(corrupt("{\"" + std::string(1000, 'k') + "\":1,\"" + std::string(1000, 'k') + "\":1}").size() < 200);
}

TEST_CASE("a complaint carries the path, what was found and what is allowed") {
  const Json json = parse(R"({"a": {"b": [1, "x"]}, "more": 0})");
  JsonObject root(JsonField(json, "file"));
  JsonObject a(root.take("a"));
  const JsonField b = a.take("b");
  CHECK(error_of(ErrorKind::corrupt, [&] { b[1].as_integer(0, 3); }) ==
        "file.a.b[1]: found \"x\", expected an integer from 0 to 3");
  CHECK(contains(error_of(ErrorKind::corrupt, [&] { a.take("c"); }), "file.a: key 'c' is missing"));
  CHECK(contains(error_of(ErrorKind::unsupported, [&] { root.finish(); }), "'more'"));
}

TEST_CASE("integers past 64 bits are not mistaken for small ones") {
  const Json json = parse("[18446744073709551616, -9223372036854775808]");
  const JsonField list(json, "file");
  CHECK_THROWS_AS(list[0].as_integer(0, 100), Error);
  CHECK(list[1].as_integer(INT64_MIN, 0) == INT64_MIN);
}
