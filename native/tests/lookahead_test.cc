// Predictors: what their scores are worth, the profile that they read, and when reading ahead pays.
#include "experts/lookahead.h"

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "experts/preloader.h"
#include "experts/trial.h"
#include "quant/pack.h"
#include "store_support.h"
#include "support.h"

namespace edgert {
namespace {

using test::error_of;
using test::SmallModel;
using test::StoreFixture;

const std::vector<int> kRows = {6, 6, 6};

// Scores what it is told to.
class Scripted final : public Predictor {
 public:
  explicit Scripted(const std::vector<float>& scores) : scores_(scores) {}
  void score(const Sight&, std::span<float> scores) override {
    std::copy(scores_.begin(), scores_.end(), scores.begin());
  }

 private:
  const std::vector<float>& scores_;
};

void run_token(Lookahead& lookahead, const std::vector<std::vector<std::int32_t>>& rows) {
  for (std::size_t row = 0; row < rows.size(); ++row)
    lookahead.routed({.row = static_cast<int>(row), .experts = rows[row]});
}

TEST_CASE("a rank is worth what it was of late") {
  const std::vector<float> scores = {0, 5, 4, 1, 2, 3};  // the order is 1 2 5 4 3 0
  Lookahead lookahead(std::make_unique<Scripted>(scores), kRows);
  for (int token = 0; token < 400; ++token) {
    const std::int32_t second = token % 4 == 0 ? 2 : 0;
    run_token(lookahead, {{0, 1}, {second, 1}, {1, 4}});
  }
  lookahead.routed({.row = 0, .experts = std::vector<std::int32_t>{0, 1}});
  const auto p = lookahead.expected();
  REQUIRE(p.size() == 6);
  CHECK(p[1] > 0.95F);                                 // the first of every order was used every time
  CHECK(p[2] == doctest::Approx(0.125).epsilon(0.2));  // the second at every fourth token of one row of two
  CHECK(p[4] > 0.4F);
  CHECK(p[5] < 0.05F);
  CHECK(lookahead.counts().expected == 400 * 2 * 2);
  CHECK(lookahead.counts().used == 400 * 2 + 100);
}

TEST_CASE("nothing is expected of the first row, nor after the last") {
  const std::vector<float> scores(6, 1.0F);
  Lookahead lookahead(std::make_unique<Scripted>(scores), kRows);
  CHECK(lookahead.expected().empty());
  run_token(lookahead, {{0, 1}, {0, 1}, {0, 1}});
  CHECK(lookahead.expected().empty());
  lookahead.routed({.row = 0, .experts = std::vector<std::int32_t>{4, 5}});
  CHECK(lookahead.expected().size() == 6);
  CHECK(lookahead.counts().expected == 4);
}

TEST_CASE("scores that are no numbers rank last") {
  const std::vector<float> scores = {std::nanf(""), 1, std::nanf(""), 2, 0, -1};
  Lookahead lookahead(std::make_unique<Scripted>(scores), kRows);
  run_token(lookahead, {{3, 1}, {3, 1}, {3, 1}});
  CHECK(lookahead.counts().used == 4);
}

// A trial of steps that take a second, and `gain` less when it is on; `noise` of both signs on top.
double share_on(Trial& trial, int steps, double gain, double noise) {
  std::mt19937 draw(7);
  int on = 0;
  for (int i = 0; i < steps; ++i) {
    on += trial.on() ? 1 : 0;
    const double error = noise * (static_cast<double>(draw() % 2001) / 1000 - 1);
    trial.step(1 + error - (trial.on() ? gain : 0));
  }
  return static_cast<double>(on) / steps;
}

TEST_CASE("a trial keeps what gains, and looks again now and then") {
  Trial trial;
  CHECK(share_on(trial, 20000, 0.05, 0.1) > 0.9);
}

TEST_CASE("a trial turns off what loses, and soon tries it ever less") {
  Trial trial;
  CHECK(share_on(trial, 2000, -0.2, 0.1) < 0.1);
  CHECK(share_on(trial, 100000, -0.2, 0.1) < 0.005);
}

TEST_CASE("a trial leaves off what makes no difference") {
  for (const double noise : {0.0, 0.1}) {
    CAPTURE(noise);
    Trial trial;
    CHECK(share_on(trial, 50000, 0, noise) < 0.1);
  }
}

TEST_CASE("a trial finds out when what lost begins to gain, and the other way round") {
  Trial trial;
  share_on(trial, 3000, -0.1, 0.05);
  CHECK_FALSE(trial.on());
  CHECK(share_on(trial, 20000, 0.1, 0.05) > 0.6);
  CHECK(share_on(trial, 20000, -0.1, 0.05) < 0.15);
}

TEST_CASE("time that drifts evenly is no gain") {
  Trial trial;
  int on = 0;
  for (int i = 0; i < 400; ++i) {
    on += trial.on() ? 1 : 0;
    trial.step(1 - 0.002 * i);
  }
  CHECK(on < 100);
  CHECK_FALSE(trial.on());
}

// A profile of rows of 3, 2 and 4 experts, written from the format's definition.
struct ProfileBytes {
  static constexpr int kHidden = 32;
  const std::vector<int> rows = {3, 2, 4};
  std::vector<std::byte> bytes;

  void append(const void* data, std::size_t count) {
    const auto* from = static_cast<const std::byte*>(data);
    bytes.insert(bytes.end(), from, from + count);
    bytes.resize(round_up(bytes.size(), 64));
  }
  template <typename T>
  void append(const std::vector<T>& values) {
    append(values.data(), values.size() * sizeof(T));
  }
  explicit ProfileBytes(std::uint32_t parts = 3) {
    std::uint32_t header[16 + 3] = {};
    std::memcpy(header, "EDGERTRP", 8);
    header[2] = 1;
    header[3] = 3;
    header[4] = kHidden;
    header[5] = parts;
    for (std::size_t i = 0; i < 3; ++i) header[16 + i] = static_cast<std::uint32_t>(rows[i]);
    append(header, sizeof header);
    for (std::size_t n = 0; n < 3 && (parts & 1) != 0; ++n) {
      append(std::vector<float>(static_cast<std::size_t>(rows[n]), -1));
      for (std::size_t d = 1; d <= std::min<std::size_t>(n, 2); ++d) {
        std::vector<std::uint16_t> addends;
        for (int i = 0; i < rows[n - d] * rows[n]; ++i)
          addends.push_back(float_to_half(static_cast<float>(i) / static_cast<float>(d)));
        append(addends);
      }
    }
    for (std::size_t n = 1; n < 3 && (parts & 2) != 0; ++n) {
      const auto experts = static_cast<std::size_t>(rows[n]);
      append(std::vector<float>(experts, 0.5F));
      std::vector<std::byte> packed(packed_bytes(format(FormatId::int8), experts, kHidden));
      const std::vector<float> weights(experts * kHidden, 0.25F);
      pack_matrix(format(FormatId::int8), SourceType::f32, std::as_bytes(std::span(weights)), experts,
                  kHidden, packed, {}, 1);
      append(packed);
    }
  }
  RoutingProfile read() const { return RoutingProfile(bytes, "profile", rows, kHidden); }
};

TEST_CASE("the dictionary adds what the experts of the two rows before say") {
  const RoutingProfile profile = ProfileBytes().read();
  PredictorSources sources;
  sources.profile = &profile;
  const auto dictionary = make_dictionary(sources);
  std::vector<float> two(2);
  dictionary->score({.row = 0, .experts = std::vector<std::int32_t>{0, 2}}, two);
  CHECK(two == std::vector<float>{-1 + 0 + 4, -1 + 1 + 5});
  std::vector<float> four(4);
  dictionary->score({.row = 1, .experts = std::vector<std::int32_t>{1}}, four);
  // row 1's expert 1 adds 4 to 7; row 0's experts 0 and 2 add half of 0 to 3 and of 8 to 11
  CHECK(four == std::vector<float>{-1 + 4 + 4, -1 + 5 + 5, -1 + 6 + 6, -1 + 7 + 7});
}

TEST_CASE("a trained lookahead multiplies what the router read") {
  const RoutingProfile profile = ProfileBytes().read();
  ThreadPool pool(1);
  PredictorSources sources;
  sources.hidden = ProfileBytes::kHidden;
  sources.profile = &profile;
  sources.pool = &pool;
  sources.kernels = &kernels("scalar");
  sources.routers.resize(3);
  const std::vector<float> bias = {0, 100};
  sources.routers[1].selection_bias = bias.data();
  sources.routers[1].sigmoid = true;
  const auto trained = make_trained_lookahead(sources);
  const std::vector<float> input(ProfileBytes::kHidden, 1);
  std::vector<float> four(4);
  trained->score({.row = 1, .experts = {}, .router_input = input.data()}, four);
  for (const float score : four) CHECK(score == doctest::Approx(8.5).epsilon(0.02));
  std::vector<float> two(2);
  trained->score({.row = 0, .experts = {}, .router_input = input.data()}, two);
  CHECK(two[0] == doctest::Approx(1).epsilon(0.01));
  CHECK(two[1] == doctest::Approx(101).epsilon(0.01));
}

TEST_CASE("a routing profile of another kind, model or version is refused by file and offset") {
  const auto refused = [](ErrorKind kind, auto&& damage) {
    ProfileBytes profile;
    damage(profile.bytes);
    return error_of(kind, [&] { profile.read(); });
  };
  const auto put = [](std::size_t offset, auto value) {
    return [=](std::vector<std::byte>& bytes) { std::memcpy(bytes.data() + offset, &value, sizeof value); };
  };
  using Bytes = std::vector<std::byte>;
  constexpr ErrorKind kCorrupt = ErrorKind::corrupt;
  CHECK(refused(kCorrupt, [](Bytes& b) { b.clear(); }) == "profile: offset 0: not a routing profile");
  CHECK(refused(kCorrupt, put(3, 'x')) == "profile: offset 0: not a routing profile");
  CHECK(refused(ErrorKind::unsupported, put(8, 2)).find("version 2, this edgert reads up to 1") !=
        std::string::npos);
  CHECK(refused(kCorrupt, put(8, 0)).find("offset 8") != std::string::npos);
  CHECK(
      refused(kCorrupt, put(12, 1U << 31)).find("offset 12: layers with routed experts: found 2147483648") !=
      std::string::npos);
  CHECK(refused(kCorrupt, put(16, -1)).find("offset 16: hidden size") != std::string::npos);
  CHECK(refused(kCorrupt, put(20, 4)).find("offset 20: parts: found 4") != std::string::npos);
  CHECK(refused(kCorrupt, put(20, 1)).find("its header makes it") != std::string::npos);
  CHECK(refused(kCorrupt, [](Bytes& b) { b.pop_back(); }).find("its header makes it") != std::string::npos);
  CHECK(refused(kCorrupt, [](Bytes& b) { b.resize(b.size() + 64); }).find("ends here") != std::string::npos);
  CHECK(refused(kCorrupt, put(68, 3)).find("offset 68: experts: found 3, this model has 2") !=
        std::string::npos);
  // the first row's base, the second row's table, its shift, a scale of its matrix
  const std::size_t table = 128 + 64 + 64;
  const std::size_t shift = table + 64 + 64 + 64 + 64;
  CHECK(refused(kCorrupt, put(132, std::nanf(""))).find("offset 128") != std::string::npos);
  CHECK(refused(kCorrupt, put(table + 2, std::uint16_t{0x7C00})).find("offset " + std::to_string(table)) !=
        std::string::npos);
  CHECK(refused(kCorrupt, put(shift, INFINITY)).find("offset " + std::to_string(shift)) != std::string::npos);
  const std::size_t codes = 16 * ProfileBytes::kHidden;
  CHECK(refused(kCorrupt, put(shift + 64 + codes, std::uint16_t{0x7E00}))
            .find("offset " + std::to_string(shift + 64)) != std::string::npos);
}

TEST_CASE("what is likelier than not is read ahead, the likeliest first, and nothing else") {
  StoreFixture f(12, SmallModel{.layers = 3, .experts = 10});
  const auto offset = [&](int expert) {
    return f.bundle.manifest().experts[1].experts[static_cast<std::size_t>(expert)].extent.offset;
  };
  f.take_all(1, {2});
  f.store.expect(1, std::vector<float>{0.1F, 0.6F, 0.9F, 0.8F, 0.5F, 0.49F, 0, 0, 0, 0});
  f.store.preload(1);
  REQUIRE(f.reader.queued() == 2);
  CHECK(f.reader.offset(0) == offset(3));
  CHECK(f.reader.offset(1) == offset(1));
  f.reader.complete_all();
  f.take_all(1, {1, 5});
  const ExpertStatistics s = f.store.statistics();
  CHECK(s.prefetches == 3);
  CHECK(s.prefetch_hits == 1);
  CHECK(s.misses == 2);  // 2 at first, and 5
}

TEST_CASE("a guess evicts only what is less likely to be needed") {
  StoreFixture f(8, SmallModel{.layers = 2, .experts = 10}, Eviction::forecast);
  const std::vector<int> often = {0, 1, 2, 3};
  for (int token = 0; token < 30; ++token) {
    f.take_all(0, often);
    f.take_all(1, often);
  }
  const auto evictions = f.store.statistics().evictions;
  std::vector<float> expected(10, 0.0F);
  expected[7] = 0.55F;
  f.store.expect(1, expected);
  f.store.preload(1);
  f.reader.complete_all();
  // Experts 0 to 3 of this layer sit the next visit out by that word, so one of them may go; none of layer 0.
  for (int expert = 0; expert < 4; ++expert)
    CHECK(f.store.residency()[0][static_cast<std::size_t>(expert)] == ExpertStore::Residency::resident);
  CHECK(f.store.statistics().evictions <= evictions + 1);
}

TEST_CASE("guesses that nobody asks for count as wasted") {
  StoreFixture f(8, SmallModel{.layers = 3, .experts = 10});
  f.store.expect(1, std::vector<float>{0.9F, 0, 0, 0, 0, 0, 0, 0, 0, 0});
  f.store.preload(1);
  f.reader.complete_all();
  f.take_all(1, {5});
  f.take_all(0, {0, 1, 2, 3, 4, 5, 6});
  const ExpertStatistics s = f.store.statistics();
  CHECK(s.prefetches == 1);
  CHECK(s.prefetches_wasted == 1);
  CHECK(s.wasted_bytes == s.prefetched_bytes);
}

// Experts of more than one piece of a guess's read.
const SmallModel kLarge = {.hidden = 512, .layers = 2, .experts = 8, .intermediate = 1024};

TEST_CASE("a guess is given up between two pieces when its layer has come without it") {
  StoreFixture f(16, kLarge);
  REQUIRE(f.slot > (512 << 10));
  f.store.expect(1, std::vector<float>{0.9F, 0.8F, 0, 0, 0, 0, 0, 0});
  f.store.preload(1);
  const auto request = f.store.acquire(1, std::vector{0, 4}, f.cancelled);
  CHECK(f.reader.queued() == 3);
  f.reader.complete_one();  // expert 0's first piece: wanted, so the rest follows
  f.reader.complete_one();  // expert 1's: not wanted
  CHECK(f.store.statistics().prefetches_wasted == 1);
  CHECK(f.store.statistics().wasted_bytes == 512 << 10);
  CHECK(f.store.residency()[1][1] == ExpertStore::Residency::absent);
  f.reader.complete_all();
  std::set<int> seen;
  while (const auto lease = request->next()) seen.insert(lease->expert());
  CHECK(seen == std::set<int>{0, 4});
  CHECK(f.store.statistics().slot_bytes == 2 * f.slot);
  CHECK(f.store.statistics().prefetches_late == 1);
}

TEST_CASE("a guess that goes well is read whole and checked") {
  StoreFixture f(16, kLarge);
  f.store.expect(1, std::vector<float>{0.9F, 0, 0, 0, 0, 0, 0, 0});
  SUBCASE("at once") {}
  SUBCASE("after damage on the way") { f.reader.spoil = 1; }
  f.store.preload(1);
  f.reader.complete_all();
  CHECK(f.store.residency()[1][0] == ExpertStore::Residency::resident);
  f.take_all(1, {0});
  CHECK(f.store.statistics().prefetch_hits == 1);
}

TEST_CASE("a preloader reads ahead while it is on, and says so") {
  StoreFixture f(12, SmallModel{.layers = 3, .experts = 6});
  const std::vector<float> scores = {9, 8, 0, 0, 0, 0};
  double now = 0;
  Preloader preloader(f.store, Lookahead(std::make_unique<Scripted>(scores), std::vector{6, 6, 6}), {0, 1, 2},
                      [&] { return now; });
  const std::vector<std::int32_t> experts = {0, 1};
  const auto token = [&] {
    preloader.begin_step();
    for (int row = 0; row < 3; ++row) {
      f.take_all(row, {0, 1});
      preloader.routed({.row = row, .experts = experts});
      f.reader.complete_all();
    }
    now += 1;
    preloader.end_step();
  };
  preloader.force(false);
  token();
  CHECK(f.store.statistics().prefetches == 0);
  CHECK_FALSE(preloader.statistics().on);
  preloader.force(std::nullopt);  // the trial begins with it on
  CHECK(preloader.statistics().on);
  for (int i = 0; i < Trial::kWindow; ++i) token();
  CHECK_FALSE(preloader.statistics().on);
  const PreloadStatistics s = preloader.statistics();
  CHECK(s.steps == Trial::kWindow + 1);
  CHECK(s.steps_on == Trial::kWindow);
  CHECK(s.expected == s.used);
  CHECK(s.expected == (Trial::kWindow + 1) * 4);
}

}  // namespace
}  // namespace edgert
