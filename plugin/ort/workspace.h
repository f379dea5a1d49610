// SPDX-License-Identifier: Apache-2.0
// Memory beside a call's tensors. On CUDA one buffer for each stream, which all nodes that run there share, one after the other:
// it grows in the runs before a CUDA graph is captured, and nothing is allocated while one is. On the CPU the heap: there
// KernelContext_GetScratchBuffer crashes in ONNX Runtime 1.18 to 1.20. Used by kernel.cpp.
#pragma once

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "op.h"

namespace fa::plugin {

/// Device memory for the calls in one stream of one device. Freed with the last node that used it.
class StreamMemory {
 public:
  StreamMemory() = default;
  StreamMemory(const StreamMemory&) = delete;
  StreamMemory& operator=(const StreamMemory&) = delete;
  ~StreamMemory();

  /// Held while a call enqueues its kernels, so that no other thread's kernels come between them in the stream.
  std::mutex& mutex() { return mutex_; }

  /// At least `bytes`. The mutex is held. An error where the stream is being captured and the memory would have to grow.
  Status reserve(const Ort::KernelContext& context, void* stream, size_t bytes);
  void* data() const { return buffers_.empty() ? nullptr : buffers_.back().data; }
  size_t bytes() const { return buffers_.empty() ? 0 : buffers_.back().bytes; }

 private:
  struct Buffer {
    OrtAllocator* allocator;  // the session's arena; released with the buffer
    void* data;
    size_t bytes;
  };
  std::mutex mutex_;
  // The last one is in use. The others, together no larger, stay: kernels under way and CUDA graphs know their addresses.
  std::vector<Buffer> buffers_;
};

/// The streams on which a node has run, and their memory. Thread-safe.
class StreamMemories {
 public:
  /// Lives as long as this object.
  StreamMemory& find(int device_id, void* stream) const;

 private:
  using Place = std::pair<int, void*>;  // device, stream
  mutable std::mutex mutex_;
  mutable std::vector<std::pair<Place, std::shared_ptr<StreamMemory>>> known_;
};

/// The workspace of one call; lives until the call has been enqueued.
class Workspace {
 public:
  /// Adds workspace of `bytes` to `execution`, for its stream where it is on CUDA.
  Status reserve(const Ort::KernelContext& context, const StreamMemories& memories, const Device& device, int device_id,
                 size_t bytes, ExecutionContext* execution);

 private:
  std::unique_ptr<char[]> heap_;
  std::unique_lock<std::mutex> lock_;
};

}  // namespace fa::plugin
