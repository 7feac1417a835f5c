// A policy that gives every expert, resident or not, a value, and evicts what has the least of it; of equals
// the one used longest ago. Values change when a row is visited; what the rows count for against each other
// may change with every visit.
//
// What was read in passing goes before all else, the last one first: a scan that comes round again finds the
// others still there.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "experts/eviction.h"

namespace edgert {

class RankedPolicy : public EvictionPolicy {
 public:
  void used(int entry) final;
  void passed(int entry) override;
  void removed(int entry) final;
  int victim(const Evictable& evictable) final;

  static std::uint64_t bytes(std::span<const int> rows) noexcept;

 protected:
  explicit RankedPolicy(std::span<const int> rows);
  // What this row's values are multiplied by now; above 0.
  virtual double weight(int /*row*/) const { return 1; }

  int row_count() const noexcept { return static_cast<int>(rows_.size()); }
  int row_size(int row) const noexcept { return rows_[static_cast<std::size_t>(row)].count; }
  int first_entry(int row) const noexcept { return rows_[static_cast<std::size_t>(row)].first; }
  double worth(int entry) const {
    const Entry& e = entries_[static_cast<std::size_t>(entry)];
    return weight(e.row) * e.value;
  }
  double value(int entry) const noexcept { return entries_[static_cast<std::size_t>(entry)].value; }
  void set_value(int entry, double value) noexcept;  // not below 0

 private:
  enum class Place : std::uint8_t { absent, passing, kept };
  struct Entry {
    double value = 0;
    std::uint64_t stamp = 0;  // of the last use, or of the reading in passing
    int row = 0;
    Place place = Place::absent;
  };
  struct Row {
    int first = 0;
    int count = 0;
    int least = -1;  // the entry that goes first of the row; -1: none, or not known
    bool known = false;
  };
  Row& row_of(int entry) {
    return rows_[static_cast<std::size_t>(entries_[static_cast<std::size_t>(entry)].row)];
  }
  void changed(int entry) { row_of(entry).known = false; }
  bool goes_before(int a, double weight_of_a, int b, double weight_of_b) const noexcept;
  template <typename Admit>
  int least(const Row& row, const Admit& admit) const;

  std::vector<Entry> entries_;
  std::vector<Row> rows_;
  std::uint64_t clock_ = 0;
};

// How many layers with routed experts run until `row` does again, when `running` does: 1 to `rows`.
inline int distance(int row, int running, int rows) noexcept { return (row - running - 1 + rows) % rows + 1; }

}  // namespace edgert
