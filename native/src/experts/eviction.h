// Which resident expert goes when a slot is needed. One file a policy.
//
// Threads: called by the store with its lock held. Entries are the store's indices.
#pragma once

#include <functional>
#include <memory>

namespace edgert {

class EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;
  virtual void used(int entry) = 0;     // asked for, or just read
  virtual void passed(int entry) = 0;   // the same in passing: it goes first, unless it stood there before
  virtual void removed(int entry) = 0;  // no longer resident
  // The entry to evict among those that `evictable` admits; -1 for none.
  virtual int victim(const std::function<bool(int)>& evictable) = 0;
};

std::unique_ptr<EvictionPolicy> make_lru(int entries);

}  // namespace edgert
