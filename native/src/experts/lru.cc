// Least recently used, as a doubly linked list through arrays: every operation but victim() is O(1).
#include <vector>

#include "experts/eviction.h"

namespace edgert {
namespace {

class Lru final : public EvictionPolicy {
 public:
  explicit Lru(int entries)
      : end_(entries),
        next_(static_cast<std::size_t>(entries) + 1, entries),
        previous_(static_cast<std::size_t>(entries) + 1, entries),
        linked_(static_cast<std::size_t>(entries), false) {}

  void used(int entry) override {
    removed(entry);
    insert(previous(end_), entry, end_);
  }

  void passed(int entry) override {
    if (!linked_[static_cast<std::size_t>(entry)]) insert(end_, entry, next(end_));
  }

  void removed(int entry) override {
    if (!linked_[static_cast<std::size_t>(entry)]) return;
    link(previous(entry), next(entry));
    linked_[static_cast<std::size_t>(entry)] = false;
  }

  int victim(const std::function<bool(int)>& evictable) override {
    for (int entry = next(end_); entry != end_; entry = next(entry)) {
      if (evictable(entry)) return entry;
    }
    return -1;
  }

 private:
  int next(int entry) const { return next_[static_cast<std::size_t>(entry)]; }
  int previous(int entry) const { return previous_[static_cast<std::size_t>(entry)]; }
  void insert(int before, int entry, int after) {
    link(before, entry);
    link(entry, after);
    linked_[static_cast<std::size_t>(entry)] = true;
  }
  void link(int before, int after) {
    next_[static_cast<std::size_t>(before)] = after;
    previous_[static_cast<std::size_t>(after)] = before;
  }

  int end_;  // the list's head and tail
  std::vector<int> next_;
  std::vector<int> previous_;
  std::vector<bool> linked_;
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_lru(int entries) { return std::make_unique<Lru>(entries); }

}  // namespace edgert
