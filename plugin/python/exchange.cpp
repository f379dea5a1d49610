// SPDX-License-Identifier: Apache-2.0
// Reads objects through DLPack's C exchange API and runs calls on them (exchange.h).
#include "exchange.h"

#include <memory>

namespace fa::plugin {
namespace {

/// Memory of the framework; it goes back to it in the order of the stream.
class Workspace {
 public:
  Workspace(const dlpack::ExchangeApi* api, dlpack::Device device, size_t bytes) {
    auto shape = static_cast<int64_t>(bytes);
    dlpack::DLTensor prototype{nullptr, device, 1, {dlpack::kUInt, 8, 1}, &shape, nullptr, 0};
    std::string problem = "no memory";
    const auto keep = [](void* context, const char*, const char* message) { *static_cast<std::string*>(context) = message; };
    if (api->allocate(&prototype, &tensor_, &problem, keep) != 0)
      throw Error(kFaRuntimeError, "no workspace of " + std::to_string(bytes) + " bytes: " + problem);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { tensor_->deleter(tensor_); }

  void* data() const { return static_cast<char*>(tensor_->dl_tensor.data) + tensor_->dl_tensor.byte_offset; }

 private:
  dlpack::DLManagedTensorVersioned* tensor_ = nullptr;
};

}  // namespace

ObjectCall::ObjectCall(const FaObjectCall& given) : api_(given.api) {
  void* const* objects = reinterpret_cast<void* const*>(&given + 1);
  std::vector<FaArray> arrays(given.num_inputs + given.num_others);
  for (size_t i = 0; i < arrays.size(); ++i) {
    arrays[i].object = objects[i] == given.none ? nullptr : objects[i];
    arrays[i].api = api_;
  }
  const Array query = array_from("query", arrays[0]);
  device_ = {query.device == DeviceType::kCuda ? dlpack::kCuda : dlpack::kCpu, query.device_id};
  void* stream = nullptr;
  if (query.device == DeviceType::kCuda && api_->current_stream(device_.device_type, device_.device_id, &stream) != 0)
    throw Error(kFaRuntimeError, "the current stream is unknown");
  call_.emplace(*given.node, arrays.data(), given.num_inputs, reinterpret_cast<uintptr_t>(stream));
  const FaArray* others = arrays.data() + given.num_inputs;
  workspace_bytes_ =
      given.is_backward ? call_->prepare_backward(others, nullptr) : call_->prepare(others, given.num_others, nullptr);
}

void ObjectCall::run(int64_t num_threads) {
  if (workspace_bytes_ == 0) return call_->run(nullptr, 0, num_threads);
  const Workspace workspace(api_, device_, workspace_bytes_);
  call_->run(workspace.data(), workspace_bytes_, num_threads);
}

}  // namespace fa::plugin
