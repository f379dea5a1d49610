// SPDX-License-Identifier: Apache-2.0
// Memory beside a call's tensors: from the session's arena on CUDA, from the heap on the CPU. Used by kernel.cpp.
// NOTE: on the CPU provider KernelContext_GetScratchBuffer crashes in ONNX Runtime 1.18 to 1.20.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "op.h"

namespace fa::plugin {

/// Buffers whose addresses a CUDA graph has recorded: they live as long as the kernel. Thread-safe.
class RetainedBuffers {
 public:
  ~RetainedBuffers();
  void* allocate(const OrtKernelContext* context, const OrtMemoryInfo* memory, size_t bytes) const;

 private:
  struct Buffer {
    OrtAllocator* allocator;  // released with the buffer
    void* data;
  };
  mutable std::mutex mutex_;
  mutable std::vector<Buffer> buffers_;
};

/// The workspace of one call; goes back to the arena when the call has been enqueued.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace();

  /// execution.workspace_bytes for its device and stream; while the stream is captured, from `retained`.
  Status allocate(const Ort::KernelContext& context, const ExecutionContext& execution, const RetainedBuffers* retained);
  void* data() const { return data_; }

 private:
  std::unique_ptr<char[]> heap_;
  OrtAllocator* allocator_ = nullptr;  // owns data_ where set
  void* data_ = nullptr;
};

/// Makes the device current and tells what it is; kUnsupported in a build without CUDA.
Status use_cuda_device(int device_id, DeviceInfo* device);

}  // namespace fa::plugin
