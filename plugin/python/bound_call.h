// SPDX-License-Identifier: Apache-2.0
// One call of the operator, bound to its inputs. Python allocates the outputs (and the workspace) with the caller's own framework
// and hands them over as arrays; nothing is copied. Behind the C interface of api.cpp. What fails throws an Error.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "arrays.h"
#include "cuda_device.h"
#include "fa/backward.h"

namespace fa::plugin {

class BoundCall {
 public:
  /// The node and the arrays' memory must outlive the call.
  BoundCall(const Node& node, const FaArray* inputs, size_t num_inputs, uintptr_t stream);

  /// Throws what prepare() would, before there are outputs.
  void validate() const;
  std::vector<FaOutput> outputs() const;  // in the node's order
  bool is_cuda() const { return arrays_[0].device == DeviceType::kCuda; }

  size_t prepare(const FaArray* outputs, size_t num_outputs, const char* kernel);  // null: any
  size_t prepare_backward(const FaArray* arrays, const char* kernel);              // by FaGradient
  void run(void* workspace, size_t workspace_bytes, int64_t num_threads);
  std::string explain(const std::string& device) const;

 private:
  Device device_of_query(CudaDeviceGuard* guard) const;
  void check_device(const char* name, const Array& array) const;
  Array take_row_major(const char* name, const Tensor& want, const FaArray& given) const;
  void take_output(size_t slot, const FaArray& given);
  void check_inputs() const;
  Problem bind_gradients(const FaArray* arrays) const;
  void* take_as(Output output, FaGradient which, const FaArray* arrays) const;
  Tensor take_gradient(FaGradient which, int slot, const FaArray& given) const;
  int slot_of_bias() const;

  const Node& node_;
  std::vector<Array> arrays_;  // the inputs
  Problem problem_;
  Plan plan_;
  Gradients gradients_;
  BackwardPlan backward_;  // has a kernel after prepare_backward()
  uintptr_t stream_;
};

}  // namespace fa::plugin
