// SPDX-License-Identifier: Apache-2.0
// Tasks on the host's threads, each thread with scratch memory of its own. Used by the forward and the backward pass on the CPU.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <string>

#include "fa/attention.h"
#include "fa/threads.h"

namespace fa::cpu {

inline int64_t num_threads(const ExecutionContext& context) {
  return context.parallel_for == nullptr ? 1 : static_cast<int64_t>(hardware_threads());
}

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};

/// Runs run(i, scratch) for i in [0, num_tasks), in the order of their start: each worker takes the next task until none is left.
template <class Run>
class Workers {
 public:
  Workers(size_t num_tasks, size_t scratch_bytes, const Run& run)
      : num_tasks_(num_tasks), scratch_bytes_(scratch_bytes), run_(run) {}

  Status run_all(const ExecutionContext& context) {
    const size_t workers = std::min<size_t>(num_tasks_, num_threads(context));
    if (workers <= 1) {
      work(this, 0);
    } else {
      context.parallel_for(context.pool, workers, work, this);
    }
    if (!out_of_memory_) return {};
    return {StatusCode::kUnsupported,
            "out of memory: the CPU kernel needs " + std::to_string(scratch_bytes_) + " bytes for each thread"};
  }

 private:
  static void work(void* self_, size_t) {
    Workers& self = *static_cast<Workers*>(self_);
    size_t i = self.next_.fetch_add(1);
    if (i >= self.num_tasks_) return;
    std::unique_ptr<void, FreeDeleter> scratch(std::aligned_alloc(64, (self.scratch_bytes_ + 63) / 64 * 64));
    if (scratch == nullptr) {
      self.out_of_memory_ = true;
      return;
    }
    for (; i < self.num_tasks_; i = self.next_.fetch_add(1)) self.run_(i, scratch.get());
  }

  const size_t num_tasks_, scratch_bytes_;
  const Run& run_;
  std::atomic<size_t> next_{0};
  std::atomic<bool> out_of_memory_{false};
};

template <class Run>
Status run_tasks(size_t num_tasks, size_t scratch_bytes, const ExecutionContext& context, const Run& run) {
  return Workers<Run>(num_tasks, scratch_bytes, run).run_all(context);
}

}  // namespace fa::cpu
