// SPDX-License-Identifier: Apache-2.0
// See workspace.h.
#include "workspace.h"

#include <algorithm>
#include <map>

#ifdef FA_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace fa::plugin {
namespace {

Status is_captured(void* stream, bool* captured) {
  *captured = false;
#ifdef FA_WITH_CUDA
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return {StatusCode::kCudaError, std::string("cudaStreamIsCapturing failed: ") + cudaGetErrorString(error) + "."};
  }
  *captured = status != cudaStreamCaptureStatusNone;
#else
  (void)stream;
#endif
  return {};
}

}  // namespace

StreamMemory::~StreamMemory() {
  for (const Buffer& buffer : buffers_) {
    buffer.allocator->Free(buffer.allocator, buffer.data);
    Ort::GetApi().ReleaseAllocator(buffer.allocator);
  }
}

Status StreamMemory::reserve(const Ort::KernelContext& context, void* stream, size_t bytes) {
  if (bytes <= this->bytes()) return {};
  bool captured = false;
  if (Status s = is_captured(stream, &captured); !s.ok()) return s;
  if (captured)
    return {StatusCode::kCudaError, "needs a workspace of " + std::to_string(bytes) +
                                        " bytes while a CUDA graph is captured, but " + std::to_string(this->bytes()) +
                                        " were reserved before; run once with these shapes before the capture"};
  const size_t larger = std::max(bytes, 2 * this->bytes());
  buffers_.reserve(buffers_.size() + 1);
  const Ort::ConstMemoryInfo memory = context.GetInput(0).GetTensorMemoryInfo();
  OrtAllocator* allocator = nullptr;
  Ort::ThrowOnError(Ort::GetApi().KernelContext_GetAllocator(context.GetOrtKernelContext(), memory, &allocator));
  void* data = allocator->Alloc(allocator, larger);
  if (data == nullptr) {
    Ort::GetApi().ReleaseAllocator(allocator);
    return {StatusCode::kCudaError, "no device memory for a workspace of " + std::to_string(larger) + " bytes"};
  }
  buffers_.push_back({allocator, data, larger});
  return {};
}

StreamMemory& StreamMemories::find(int device_id, void* stream) const {
  const Place place{device_id, stream};
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [known, memory] : known_)
    if (known == place) return *memory;
  // NOTE: never freed, because sessions may outlive this library's static objects.
  static std::mutex& all_mutex = *new std::mutex;
  static auto& all = *new std::map<Place, std::weak_ptr<StreamMemory>>;
  const std::lock_guard<std::mutex> all_lock(all_mutex);
  std::shared_ptr<StreamMemory> memory = all[place].lock();
  if (!memory) all[place] = memory = std::make_shared<StreamMemory>();
  known_.emplace_back(place, memory);
  return *memory;
}

Status Workspace::reserve(const Ort::KernelContext& context, const StreamMemories& memories, const Device& device, int device_id,
                          size_t bytes, ExecutionContext* execution) {
  if (bytes == 0) return {};
  if (device.type == DeviceType::kCpu) {
    heap_.reset(new char[bytes]);
    execution->workspace = heap_.get();
    execution->workspace_bytes = bytes;
    return {};
  }
  StreamMemory& memory = memories.find(device_id, execution->stream);
  lock_ = std::unique_lock<std::mutex>(memory.mutex());
  if (Status s = memory.reserve(context, execution->stream, bytes); !s.ok()) return s;
  execution->workspace = memory.data();
  execution->workspace_bytes = memory.bytes();
  return {};
}

}  // namespace fa::plugin
