// SPDX-License-Identifier: Apache-2.0
// Binding of descriptors, and the workspace of a range of shapes.
#include "workspace.h"

#include <algorithm>
#include <vector>

#include "planned_device.h"
#include "types.h"

namespace fa::trt {
namespace {

using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;

bool is_one_shape(const plugin::Node& node, const DynamicPluginTensorDesc* inputs) {
  for (size_t i = 0; i < node.inputs.size(); ++i) {
    const Dims &least = inputs[i].min, &most = inputs[i].max;
    if (least.nbDims != most.nbDims || !std::equal(least.d, least.d + std::max(0, least.nbDims), most.d)) return false;
  }
  return true;
}

}  // namespace

Status bind_at(const plugin::Node& node, const DynamicPluginTensorDesc* inputs, Dims DynamicPluginTensorDesc::* corner,
               plugin::Problem* problem) {
  std::vector<plugin::Tensor> tensors(node.inputs.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (Status s = to_tensor(nullptr, inputs[i].desc.type, inputs[i].*corner, node.inputs[i], &tensors[i]); !s.ok()) return s;
  }
  return plugin::bind(node, tensors, problem);
}

Status bind_now(const plugin::Node& node, const nvinfer1::PluginTensorDesc* inputs, const void* const* data,
                plugin::Problem* problem) {
  std::vector<plugin::Tensor> tensors(node.inputs.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    void* memory = data ? const_cast<void*>(data[i]) : nullptr;
    if (Status s = to_tensor(memory, inputs[i].type, inputs[i].dims, node.inputs[i], &tensors[i]); !s.ok()) return s;
  }
  return plugin::bind(node, tensors, problem);
}

Status reserved_workspace(const plugin::Node& node, const DynamicPluginTensorDesc* inputs, const Device& device,
                          const char* kernel, size_t* bytes) {
  plugin::Problem largest;
  if (Status s = bind_at(node, inputs, &DynamicPluginTensorDesc::max, &largest); !s.ok()) return s;
  plugin::Plan plan, elsewhere;
  if (!is_one_shape(node, inputs) || !plugin::plan(largest, device, &plan, kernel).ok()) {
    *bytes = plugin::max_workspace_bytes(largest, device);
    return {};
  }
  // The kernels that take the place of the GPU's own ones on another GPU, and on this one where the addresses of a call are not
  // aligned for those.
  const bool has_other = kernel == nullptr && plugin::plan(largest, portable(device), &elsewhere).ok();
  *bytes = std::max(plan.workspace_bytes, has_other ? elsewhere.workspace_bytes : 0);
  return {};
}

}  // namespace fa::trt
