// SPDX-License-Identifier: Apache-2.0
// Counters that are 0 when a launch starts, without a launch that zeroes them: they lie in an array of the library's own, which
// the loader makes 0, and every launch leaves its counters at 0. Each workspace address has counters of its own: launches that
// share a workspace never overlap, so launches that share counters don't either, and a captured launch may be replayed beside
// any other.
#pragma once

#include <cstddef>
#include <mutex>
#include <unordered_map>

namespace fa {

/// Numbers of workspaces, 0, 1, 2 … in the order in which their addresses come up. Thread-safe.
class WorkspaceNumbers {
 public:
  /// How many there are.
  explicit WorkspaceNumbers(size_t limit) : limit_(limit) {}

  /// The number of this one; the limit, where all have been given to others.
  size_t at(const void* workspace) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = numbers_.find(workspace);
    if (found != numbers_.end()) return found->second;
    if (numbers_.size() == limit_) return limit_;
    return numbers_.emplace(workspace, numbers_.size()).first->second;
  }

 private:
  const size_t limit_;
  std::mutex mutex_;
  std::unordered_map<const void*, size_t> numbers_;
};

}  // namespace fa
