// SPDX-License-Identifier: Apache-2.0
// A call on objects of a Python framework that has DLPack's C exchange API (PyTorch): its tensors are read, and its memory is
// allocated, without a line of Python, which saves most of what a call costs the host. Behind the C interface of api.cpp.
#pragma once

#include "bound_call.h"

namespace fa::plugin {

class ObjectCall {
 public:
  /// On CUDA the call is for the framework's current stream. The caller holds the interpreter's lock.
  explicit ObjectCall(const FaObjectCall& given);

  bool is_cuda() const { return call_->is_cuda(); }
  /// Once; the lock isn't needed. The workspace is the framework's.
  void run(int64_t num_threads);

 private:
  const dlpack::ExchangeApi* api_;
  dlpack::Device device_;
  std::optional<BoundCall> call_;
  size_t workspace_bytes_ = 0;
};

}  // namespace fa::plugin
