#include "adapters/adapter.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <map>
#include <numeric>
#include <utility>

#include "adapters/gating.h"
#include "adapters/patch.h"
#include "bundle/xxhash.h"
#include "platform/error.h"

namespace edgert {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr std::size_t kMaxRank = 4096;
constexpr std::size_t kMaxTableRows = std::size_t{1} << 30;

std::uint64_t next_order() {
  static std::atomic<std::uint64_t> count{1};
  return count.fetch_add(1);
}

[[noreturn]] void fail(const AdapterSource& source, const std::string& message) {
  throw Error(ErrorKind::invalid_argument, "adapter: " + source.target.substr(0, 120) + ": " + message);
}

std::string sizes(std::size_t found, std::size_t wanted) {
  return "found " + std::to_string(found) + " numbers, its shape needs " + std::to_string(wanted);
}

const Format& factor_format(SourceType type) {
  return format(type == SourceType::f32   ? FormatId::f32
                : type == SourceType::f16 ? FormatId::f16
                                          : FormatId::bf16);
}

void check_finite(const AdapterSource& source, const char* what, std::span<const float> values) {
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (!std::isfinite(values[i]))
      fail(source, std::string(what) + " " + std::to_string(i) + " is not finite");
  }
}

void check_weights(const AdapterSource& source, Targets::Shape shape) {
  const std::size_t row = shape.cols * source_bytes(source.type);
  const std::size_t count = source.weight_rows.empty() ? shape.rows : source.weight_rows.size();
  if (source.weights.size() != count * row)
    fail(source, "weights: " + sizes(source.weights.size() / source_bytes(source.type), count * shape.cols));
  const std::size_t end = shape.kind == Targets::Kind::table ? kMaxTableRows : shape.rows;
  for (std::size_t i = 0; i < source.weight_rows.size(); ++i) {
    const std::int32_t at = source.weight_rows[i];
    if (at < 0 || static_cast<std::size_t>(at) >= end) {
      fail(source,
           "row " + std::to_string(at) + " is given weights, allowed are 0 to " + std::to_string(end - 1));
    }
    if (i > 0 && at <= source.weight_rows[i - 1])
      fail(source, "rows that are given weights must ascend; " + std::to_string(at) + " follows " +
                       std::to_string(source.weight_rows[i - 1]));
  }
}

// What a norm and a table cannot be given.
void check_kind(const AdapterSource& source, Targets::Kind kind) {
  const bool added = source.rank > 0 || !source.values.empty() || !source.gain.empty();
  if (kind == Targets::Kind::norm && (added || !source.weights.empty()))
    fail(source, "a norm takes a shift alone");
  if (kind == Targets::Kind::table && (added || !source.shift.empty())) fail(source, "this takes rows alone");
  if (kind != Targets::Kind::matrix && !source.gate.empty()) fail(source, "a matrix alone takes a gate");
}

void check(const AdapterSource& source, Targets::Shape shape) {
  const std::size_t element = source_bytes(source.type);
  check_kind(source, shape.kind);
  if (source.rank > kMaxRank) {
    fail(source,
         "rank " + std::to_string(source.rank) + "; at most " + std::to_string(kMaxRank) + " is allowed");
  }
  if (source.a.size() != source.rank * shape.cols * element)
    fail(source, "A: " + sizes(source.a.size() / element, source.rank * shape.cols));
  if (source.b.size() != source.rank * shape.rows * element)
    fail(source, "B: " + sizes(source.b.size() / element, source.rank * shape.rows));
  if (source.rows.size() != source.values.size() || source.cols.size() != source.values.size())
    fail(source, "as many rows and columns as values are needed");
  if (!source.remainders.empty() && source.remainders.size() != source.values.size())
    fail(source, "as many remainders as values are needed");
  if (!source.values.empty() && shape.cols > kMostPatchCols)
    fail(source, "its matrix is too wide for sparse values");
  for (std::size_t i = 0; i < source.values.size(); ++i) {
    const bool inside = source.rows[i] >= 0 && static_cast<std::size_t>(source.rows[i]) < shape.rows &&
                        source.cols[i] >= 0 && static_cast<std::size_t>(source.cols[i]) < shape.cols;
    if (inside) continue;
    fail(source, "value " + std::to_string(i) + " stands at [" + std::to_string(source.rows[i]) + ", " +
                     std::to_string(source.cols[i]) + "], the matrix is [" + std::to_string(shape.rows) +
                     ", " + std::to_string(shape.cols) + "]");
  }
  check_finite(source, "value", source.values);
  if (!source.gain.empty() && source.gain.size() != shape.rows)
    fail(source, "gain: " + sizes(source.gain.size(), shape.rows));
  check_finite(source, "gain", source.gain);
  const std::size_t shifted = shape.kind == Targets::Kind::norm ? shape.cols : shape.rows;
  if (!source.shift.empty() && source.shift.size() != shifted)
    fail(source, "shift: " + sizes(source.shift.size(), shifted));
  check_finite(source, "shift", source.shift);
  if (!source.gate.empty() && source.gate.size() != shape.cols)
    fail(source, "gate: " + sizes(source.gate.size(), shape.cols));
  check_finite(source, "gate", source.gate);
  if (!std::isfinite(source.factor_scale)) fail(source, "the scale of its factors is not finite");
  if (!source.weights.empty() || !source.weight_rows.empty()) check_weights(source, shape);
}

// Hands out room in a buffer, or counts it where there is none yet.
class Room {
 public:
  explicit Room(std::byte* base) : base_(base) {}
  template <typename T>
  T* take(std::size_t count) {
    const std::size_t at = std::exchange(used_, round_up(used_ + count * sizeof(T), kAlignment));
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + at);
  }
  std::size_t used() const noexcept { return used_; }

 private:
  std::byte* base_;
  std::size_t used_ = 0;
};

const std::byte* pack(const AdapterSource& source, std::span<const std::byte> raw, std::size_t rows,
                      std::size_t cols, Room& room, bool counting) {
  const Format& as = factor_format(source.type);
  const std::size_t bytes = packed_bytes(as, rows, cols);
  std::byte* packed = room.take<std::byte>(bytes);
  if (!counting) {
    try {
      pack_matrix(as, source.type, raw, rows, cols, {packed, bytes}, {}, 1);
    } catch (const Error& error) {
      fail(source, error.what());
    }
  }
  return packed;
}

// Where each sparse value lies: its tile, then its place there.
std::uint64_t place_of(const AdapterSource& source, std::size_t i) {
  const auto row = static_cast<std::uint64_t>(source.rows[i]),
             col = static_cast<std::uint64_t>(source.cols[i]);
  return row / kTileRows << 32 | (kTileRows * col + row % kTileRows);
}

// Fills what `part` points to.
void fill_sparse(const AdapterSource& source, std::size_t tiles, std::uint32_t* first, std::uint32_t* places,
                 float* values, std::int8_t* remainders) {
  const std::size_t count = source.values.size();
  std::vector<std::uint32_t> order;  // empty where they are in theirs already, as files have them
  for (std::size_t i = 1; i < count && order.empty(); ++i) {
    if (place_of(source, i - 1) > place_of(source, i)) order.resize(count);
  }
  std::iota(order.begin(), order.end(), std::uint32_t{0});
  std::sort(order.begin(), order.end(),
            [&](std::uint32_t a, std::uint32_t b) { return place_of(source, a) < place_of(source, b); });
  std::uint64_t before = UINT64_MAX;
  for (std::size_t n = 0; n < count; ++n) {
    const std::size_t i = order.empty() ? n : order[n];
    const std::uint64_t place = place_of(source, i);
    if (place == std::exchange(before, place)) {
      fail(source, "two values stand at [" + std::to_string(source.rows[i]) + ", " +
                       std::to_string(source.cols[i]) + "]");
    }
    ++first[(place >> 32) + 1];
    places[n] = static_cast<std::uint32_t>(place);
    values[n] = source.values[i];
    if (remainders != nullptr) remainders[n] = source.remainders[i];
  }
  for (std::size_t tile = 0; tile < tiles; ++tile) first[tile + 1] += first[tile];
}

Adapter::Part lay_out(const AdapterSource& source, Targets::Shape shape, Room& room, bool counting) {
  Adapter::Part part{.rows = shape.rows,
                     .cols = shape.cols,
                     .format = factor_format(source.type).id,
                     .gain_spares_bias = source.gain_spares_bias};
  const auto floats = [&](std::span<const float> from) -> const float* {
    if (from.empty()) return nullptr;
    auto* to = room.take<float>(from.size());
    if (!counting) std::copy(from.begin(), from.end(), to);
    return to;
  };
  if (source.rank > 0) {
    part.rank = source.rank;
    part.factor_scale = source.factor_scale;
    part.a = pack(source, source.a, source.rank, shape.cols, room, counting);
    part.b = pack(source, source.b, shape.rows, source.rank, room, counting);
  }
  if (!source.values.empty()) {
    const std::size_t tiles = (shape.rows + kTileRows - 1) / kTileRows;
    auto* first = room.take<std::uint32_t>(tiles + 1);
    auto* places = room.take<std::uint32_t>(source.values.size());
    auto* values = room.take<float>(source.values.size());
    auto* remainders = source.remainders.empty() ? nullptr : room.take<std::int8_t>(source.remainders.size());
    if (!counting) fill_sparse(source, tiles, first, places, values, remainders);
    part.first = first;
    part.places = places;
    part.remainders = remainders;
    part.values = values;
  }
  part.gain = floats(source.gain);
  part.shift = floats(source.shift);
  if (!source.weights.empty()) {
    part.weight_count = source.weight_rows.empty() ? shape.rows : source.weight_rows.size();
    part.weights = pack(source, source.weights, part.weight_count, shape.cols, room, counting);
  }
  if (!source.weight_rows.empty()) {
    auto* rows = room.take<std::int32_t>(source.weight_rows.size());
    if (!counting) std::copy(source.weight_rows.begin(), source.weight_rows.end(), rows);
    part.weight_rows = rows;
  }
  if (!source.gate.empty()) {
    auto* gate = room.take<float>(source.gate.size());
    if (!counting) {
      const Standard standard(source.gate);
      std::transform(source.gate.begin(), source.gate.end(), gate,
                     [&](float x) { return static_cast<float>(standard.of(x)); });
    }
    part.gate = gate;
  }
  return part;
}

std::uint64_t fingerprint_of_one(const AdapterSource& source) {
  Xxh64 hash;
  // Lengths too, so that nothing can move from one array into the next.
  const auto add = [&](std::span<const std::byte> bytes) {
    const std::uint64_t size = bytes.size();
    hash.update(std::as_bytes(std::span(&size, 1)));
    hash.update(bytes);
  };
  const std::uint64_t options[] = {static_cast<std::uint64_t>(source.type), source.rank,
                                   std::bit_cast<std::uint32_t>(source.factor_scale),
                                   source.gain_spares_bias ? 1U : 0U};
  add(std::as_bytes(std::span(source.target)));
  add(std::as_bytes(std::span(options)));
  add(source.a);
  add(source.b);
  add(std::as_bytes(source.rows));
  add(std::as_bytes(source.cols));
  add(std::as_bytes(source.values));
  add(std::as_bytes(source.remainders));
  add(std::as_bytes(source.gain));
  add(std::as_bytes(source.shift));
  add(source.weights);
  add(std::as_bytes(source.weight_rows));
  add(std::as_bytes(source.gate));
  return hash.digest();
}

}  // namespace

std::ptrdiff_t Adapter::Part::weight_of(std::int32_t row) const noexcept {
  if (weights == nullptr) return -1;
  if (weight_rows == nullptr) return static_cast<std::size_t>(row) < weight_count ? row : -1;
  const std::int32_t* const end = weight_rows + weight_count;
  const std::int32_t* const at = std::lower_bound(weight_rows, end, row);
  return at != end && *at == row ? at - weight_rows : -1;
}

bool Adapter::Part::replace_row(std::int32_t row, float scale, std::span<float> out,
                                std::span<float> space) const {
  const std::ptrdiff_t at = weight_of(row);
  if (at < 0) return false;
  const Format& as = edgert::format(format);
  unpack_row(as, {weights, packed_bytes(as, weight_count, cols)}, weight_count, cols,
             static_cast<std::size_t>(at), space);
  const float whole = scale_of(static_cast<std::size_t>(row), scale);
  for (std::size_t i = 0; i < out.size(); ++i) out[i] += whole * (space[i] - out[i]);
  return true;
}

Adapter::Adapter(std::shared_ptr<const Targets> targets, std::span<const AdapterSource> sources,
                 std::shared_ptr<Budget> budget, const std::string& name, std::uint64_t order,
                 std::size_t added_tokens)
    : targets_(std::move(targets)),
      name_(name),
      order_(order == 0 ? next_order() : order),
      added_tokens_(added_tokens),
      lists_bytes_(sources.size() * sizeof(Part) +
                   static_cast<std::size_t>(targets_->count()) * sizeof(std::int32_t)),
      lists_(std::make_unique<Charge>(budget, lists_bytes_, "adapter " + name)) {
  index_.assign(static_cast<std::size_t>(targets_->count()), -1);
  parts_.reserve(sources.size());
  check_targets(sources);
  Room counted(nullptr);
  for (const AdapterSource& source : sources)
    lay_out(source, shape(targets_->find(source.target)), counted, true);
  memory_ = Buffer(std::move(budget), counted.used(), "adapter " + name);
  Room room(memory_.data());
  for (const AdapterSource& source : sources) {
    const int target = targets_->find(source.target);
    parts_.push_back(lay_out(source, shape(target), room, false));
    parts_.back().own_rows = targets_->shape(target).rows;
  }
}

// With a row for each token that it brings.
Targets::Shape Adapter::shape(int target) const noexcept {
  Targets::Shape shape = targets_->shape(target);
  if (shape.vocabulary) shape.rows += added_tokens_;
  return shape;
}

// A token has an embedding, and a logit.
void Adapter::check_added_tokens(std::span<const AdapterSource> sources) const {
  if (added_tokens_ == 0) return;
  for (const char* name : {"embedding", "output"}) {
    const int target = targets_->find(name);
    const std::int32_t index = index_[static_cast<std::size_t>(target)];
    const auto own = static_cast<std::int32_t>(targets_->shape(target).rows);
    const auto end = own + static_cast<std::int32_t>(added_tokens_);
    std::ptrdiff_t given = 0;
    if (index >= 0) {
      const AdapterSource& source = sources[static_cast<std::size_t>(index)];
      const auto& rows = source.weight_rows;
      given =
          std::lower_bound(rows.begin(), rows.end(), end) - std::lower_bound(rows.begin(), rows.end(), own);
      if (rows.empty() && !source.weights.empty()) given = end - own;
    }
    if (given == end - own) continue;
    throw Error(ErrorKind::invalid_argument,
                "adapter " + name_ + ": brings " + std::to_string(added_tokens_) + " tokens and gives " +
                    std::to_string(given) + " of them weights of " + name + "; all of them are needed");
  }
}

Adapter::Adapter(std::shared_ptr<const Targets> targets, std::uint64_t fingerprint,
                 std::shared_ptr<Budget> budget, const std::string& name, std::uint64_t order)
    : Adapter(std::move(targets), std::span<const AdapterSource>(), std::move(budget), name, order) {
  fingerprint_ = fingerprint;
}

std::uint64_t Adapter::fingerprint_of(std::span<const AdapterSource> sources) {
  std::map<std::string_view, std::uint64_t> fingerprints;
  for (const AdapterSource& source : sources) fingerprints.emplace(source.target, fingerprint_of_one(source));
  Xxh64 hash;
  for (const auto& [target, one] : fingerprints) hash.update(std::as_bytes(std::span(&one, 1)));
  return hash.digest();
}

void Adapter::check_targets(std::span<const AdapterSource> sources) {
  if (added_tokens_ > kMaxTableRows)
    throw Error(ErrorKind::invalid_argument, "adapter " + name_ + ": brings " +
                                                 std::to_string(added_tokens_) + " tokens; at most " +
                                                 std::to_string(kMaxTableRows) + " are allowed");
  for (const AdapterSource& source : sources) {
    const int target = targets_->find(source.target);
    check(source, shape(target));
    std::int32_t& index = index_[static_cast<std::size_t>(target)];
    if (index >= 0) fail(source, "stands twice in the adapter");
    index = static_cast<std::int32_t>(&source - sources.data());
    if (source.gate.empty()) ungated_ = source.target;
    max_rank_ = std::max(max_rank_, source.rank);
  }
  check_added_tokens(sources);
  fingerprint_ = fingerprint_of(sources);
}

}  // namespace edgert
