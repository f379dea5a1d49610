// SPDX-License-Identifier: Apache-2.0
// Workspace of a call (workspace.h). The arena is stream-aware: a buffer that is freed after its kernels were enqueued is given
// to others only behind them. A CUDA graph is replayed without the arena's knowledge, so what it recorded is kept.
#include "workspace.h"

#ifdef FA_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace fa::plugin {
namespace {

#ifdef FA_WITH_CUDA
Status cuda_status(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return {};
  return {StatusCode::kCudaError, std::string(call) + ": " + cudaGetErrorString(error)};
}
#endif

Status is_captured(void* stream, bool* captured) {
#ifdef FA_WITH_CUDA
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (Status s = cuda_status(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "cudaStreamIsCapturing"); !s.ok())
    return s;
  *captured = status == cudaStreamCaptureStatusActive;
#else
  (void)stream;
  *captured = false;
#endif
  return {};
}

OrtAllocator* allocator_of(const OrtKernelContext* context, const OrtMemoryInfo* memory) {
  OrtAllocator* allocator = nullptr;
  Ort::ThrowOnError(Ort::GetApi().KernelContext_GetAllocator(context, memory, &allocator));
  return allocator;
}

}  // namespace

RetainedBuffers::~RetainedBuffers() {
  for (const Buffer& buffer : buffers_) {
    buffer.allocator->Free(buffer.allocator, buffer.data);
    Ort::GetApi().ReleaseAllocator(buffer.allocator);
  }
}

void* RetainedBuffers::allocate(const OrtKernelContext* context, const OrtMemoryInfo* memory, size_t bytes) const {
  OrtAllocator* allocator = allocator_of(context, memory);
  void* data = allocator->Alloc(allocator, bytes);
  const std::lock_guard<std::mutex> lock(mutex_);
  buffers_.push_back({allocator, data});
  return data;
}

Workspace::~Workspace() {
  if (!allocator_) return;
  allocator_->Free(allocator_, data_);
  Ort::GetApi().ReleaseAllocator(allocator_);
}

Status Workspace::allocate(const Ort::KernelContext& context, const ExecutionContext& execution,
                           const RetainedBuffers* retained) {
  const size_t bytes = execution.workspace_bytes;
  if (bytes == 0) return {};
  if (execution.device.type == DeviceType::kCpu) {
    heap_.reset(new char[bytes]);
    data_ = heap_.get();
    return {};
  }
  const Ort::ConstMemoryInfo memory = context.GetInput(0).GetTensorMemoryInfo();
  bool captured = false;
  if (Status s = is_captured(execution.stream, &captured); !s.ok()) return s;
  const OrtKernelContext* raw = context.GetOrtKernelContext();
  if (captured) {
    data_ = retained->allocate(raw, memory, bytes);
  } else {
    Ort::ThrowOnError(Ort::GetApi().KernelContext_GetScratchBuffer(raw, memory, bytes, &data_));
    allocator_ = allocator_of(raw, memory);
  }
  if (data_) return {};
  return {StatusCode::kCudaError, "no device memory for a workspace of " + std::to_string(bytes) + " bytes"};
}

Status use_cuda_device(int device_id, DeviceInfo* device) {
#ifdef FA_WITH_CUDA
  int current = -1;
  if (Status s = cuda_status(cudaGetDevice(&current), "cudaGetDevice"); !s.ok()) return s;
  if (current != device_id)
    if (Status s = cuda_status(cudaSetDevice(device_id), "cudaSetDevice"); !s.ok()) return s;
#else
  (void)device_id;
#endif
  return query_cuda_device(device);
}

}  // namespace fa::plugin
