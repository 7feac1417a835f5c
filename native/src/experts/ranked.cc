#include "experts/ranked.h"

namespace edgert {
namespace {

std::size_t at(int index) { return static_cast<std::size_t>(index); }

}  // namespace

RankedPolicy::RankedPolicy(std::span<const int> rows) {
  for (const int count : rows) {
    const int row = row_count();
    rows_.push_back({.first = static_cast<int>(entries_.size()), .count = count});
    entries_.resize(entries_.size() + at(count), {.row = row});
  }
}

std::uint64_t RankedPolicy::bytes(std::span<const int> rows) noexcept {
  std::uint64_t bytes = rows.size() * sizeof(Row);
  for (const int count : rows) bytes += at(count) * sizeof(Entry);
  return bytes;
}

void RankedPolicy::used(int entry) {
  Entry& e = entries_[at(entry)];
  e.place = Place::kept;
  e.stamp = ++clock_;
  changed(entry);
}

void RankedPolicy::passed(int entry) {
  Entry& e = entries_[at(entry)];
  if (e.place != Place::absent) return;
  e.place = Place::passing;
  e.stamp = ++clock_;
  changed(entry);
}

void RankedPolicy::removed(int entry) {
  entries_[at(entry)].place = Place::absent;
  changed(entry);
}

void RankedPolicy::set_value(int entry, double value) noexcept {
  entries_[at(entry)].value = value;
  changed(entry);
}

bool RankedPolicy::goes_before(int a, double weight_of_a, int b, double weight_of_b) const noexcept {
  const Entry& x = entries_[at(a)];
  const Entry& y = entries_[at(b)];
  if (x.place != y.place) return x.place == Place::passing;
  if (x.place == Place::passing) return x.stamp > y.stamp;
  const double worth_x = weight_of_a * x.value;
  const double worth_y = weight_of_b * y.value;
  return worth_x != worth_y ? worth_x < worth_y : x.stamp < y.stamp;
}

template <typename Admit>
int RankedPolicy::least(const Row& row, const Admit& admit) const {
  int best = -1;
  for (int entry = row.first; entry < row.first + row.count; ++entry) {
    if (entries_[at(entry)].place == Place::absent) continue;
    if (best >= 0 && !goes_before(entry, 1, best, 1)) continue;
    if (admit(entry)) best = entry;
  }
  return best;
}

// A row is searched again only where it changed or its least may not go: in a decode that is one of them.
int RankedPolicy::victim(const Evictable& evictable) {
  int best = -1;
  double weight_of_best = 0;
  for (int i = 0; i < row_count(); ++i) {
    Row& row = rows_[at(i)];
    if (!row.known) {
      row.least = least(row, [](int) { return true; });
      row.known = true;
    }
    int entry = row.least;
    const double weight_here = weight(i);
    if (entry < 0 || (best >= 0 && !goes_before(entry, weight_here, best, weight_of_best))) continue;
    if (!evictable(entry)) entry = least(row, evictable);
    if (entry < 0 || (best >= 0 && !goes_before(entry, weight_here, best, weight_of_best))) continue;
    best = entry;
    weight_of_best = weight_here;
  }
  return best;
}

}  // namespace edgert
