// SPDX-License-Identifier: Apache-2.0
// A ParallelFor for a process whose host has no pool of its own: threads that live for one call. Used by the Python bindings.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <system_error>
#include <thread>
#include <vector>

namespace fa {

/// Of the machine. Asking the system reads a file, so it is asked once.
inline size_t hardware_threads() {
  static const size_t count = std::max(1u, std::thread::hardware_concurrency());
  return count;
}

/// ExecutionContext::parallel_for = Threads::run, pool = a Threads. Where the system refuses threads, fewer do the work.
struct Threads {
  size_t count;

  static void run(void* pool, size_t num_tasks, void (*task)(void* arg, size_t i), void* arg) {
    std::atomic<size_t> next{0};
    const auto work = [&] {
      for (size_t i; (i = next.fetch_add(1)) < num_tasks;) task(arg, i);
    };
    const size_t wanted = std::min(static_cast<const Threads*>(pool)->count, num_tasks);
    std::vector<std::thread> threads;
    threads.reserve(wanted);
    try {
      while (threads.size() + 1 < wanted) threads.emplace_back(work);
    } catch (const std::system_error&) {
    }
    work();
    for (std::thread& thread : threads) thread.join();
  }
};

}  // namespace fa
