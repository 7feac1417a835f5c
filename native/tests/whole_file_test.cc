#include "storage/whole_file.h"

#include <algorithm>
#include <optional>

#include "platform/memory.h"
#include "support.h"

using namespace edgert;
using test::error_of;
using test::TemporaryDirectory;

namespace {

constexpr std::size_t kMiB = 1 << 20;

// Completes the latest read first, when told to.
class BackwardReader final : public Reader {
 public:
  void submit(ReadRequest request) override {
    if (refuse > 0 && --refuse == 0) throw Error(ErrorKind::io, "no room in the queue");
    queue_.push_back(std::move(request));
    most = std::max(most, queue_.size());
  }
  const char* name() const noexcept override { return "backward"; }
  void complete_one() {
    if (queue_.empty()) return;
    ReadRequest request = std::move(queue_.back());
    queue_.pop_back();
    request.file->read(request.offset, request.destination);
    ++reads;
    const bool fails = fail > 0 && --fail == 0;
    request.done(fails ? std::make_exception_ptr(Error(ErrorKind::io, "the disk is gone")) : nullptr);
  }
  int fail = 0;    // the read that fails, counted from now; 0: none
  int refuse = 0;  // likewise the submission that is refused
  int reads = 0;
  std::size_t most = 0;  // in flight

 private:
  std::vector<ReadRequest> queue_;
};

struct Fixture {
  explicit Fixture(std::size_t bytes) : content(bytes, '\0') {
    for (std::size_t i = 0; i < bytes; i += 1000) content[i] = static_cast<char>(i / 1000);
    file = File::open(directory.write("file", content), DirectIo::off);
    destination = Buffer(nullptr, bytes, "destination");
  }
  bool same(std::size_t bytes) const {
    return std::equal(content.begin(), content.begin() + static_cast<std::ptrdiff_t>(bytes),
                      reinterpret_cast<const char*>(destination.data()));
  }

  TemporaryDirectory directory;
  std::string content;
  std::shared_ptr<const File> file;
  Buffer destination;
  BackwardReader reader;
};

}  // namespace

TEST_CASE("a whole file arrives, whatever the order of its pieces, with a bounded number in flight") {
  Fixture f(90 * kMiB + 4096);
  const auto drive = [&] { f.reader.complete_one(); };
  WholeFile whole(f.file, f.reader, f.destination.span());
  whole.wait_for(1, drive);
  CHECK(f.same(1));
  CHECK(f.reader.reads > 1);  // what came before the first piece
  whole.wait_for(50 * kMiB + 1, drive);
  CHECK(f.same(50 * kMiB + 1));
  whole.wait_for(f.content.size(), drive);
  CHECK(f.same(f.content.size()));
  CHECK(f.reader.most > 4);
  CHECK(f.reader.most <= 16);
}

TEST_CASE("a whole file may be empty, and may come through a real reader") {
  const auto reader = make_pread_reader(3);
  for (const std::size_t bytes : {std::size_t{0}, 4 * kMiB, 9 * kMiB + 5}) {
    Fixture f(bytes);
    WholeFile whole(f.file, *reader, f.destination.span());
    whole.wait_for(bytes, {});
    CHECK(f.same(bytes));
  }
}

TEST_CASE("a failure ends the reading of a whole file, and leaves no read under way") {
  Fixture f(90 * kMiB);
  std::string expected = "the disk is gone";
  SUBCASE("of a read") { f.reader.fail = 5; }
  SUBCASE("to submit") {
    f.reader.refuse = 3;
    expected = "no room in the queue";
  }
  SUBCASE("to submit the next") {
    f.reader.refuse = 20;
    expected = "no room in the queue";
  }
  const auto drive = [&] { f.reader.complete_one(); };
  WholeFile whole(f.file, f.reader, f.destination.span());
  CHECK(error_of(ErrorKind::io, [&] { whole.wait_for(f.content.size(), drive); }) == expected);
  const int reads = f.reader.reads;
  for (int i = 0; i < 30; ++i) drive();
  CHECK(f.reader.reads - reads < 16);
}

TEST_CASE("reading a whole file can be stopped") {
  Fixture f(90 * kMiB);
  const auto reader = make_pread_reader(1);
  int polls = 0;
  const auto stop = [&] {
    if (++polls == 3) throw std::runtime_error("stop");
  };
  const auto read = [&] {
    WholeFile whole(f.file, *reader, f.destination.span());
    whole.wait_for(f.content.size(), stop);
    whole.wait_for(f.content.size(), stop);
    whole.wait_for(f.content.size(), stop);
  };
  CHECK_THROWS_AS(read(), std::runtime_error);
}
