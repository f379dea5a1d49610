// SPDX-License-Identifier: Apache-2.0
// Binding of descriptors, and the workspace of a range of shapes. The largest shape is not the hungriest one: few query rows are
// split over many keys, and each split keeps a partial result, while many rows need no workspace at all.
#include "workspace.h"

#include <algorithm>
#include <vector>

#include "types.h"

namespace fa::trt {
namespace {

using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;

/// Sizes between least and most at which the workspace is asked for: both ends, and what lies between in steps of an eighth.
std::vector<int64_t> sizes_between(int64_t least, int64_t most) {
  std::vector<int64_t> sizes;
  for (int64_t size = std::max<int64_t>(least, 0); size < most; size += std::max<int64_t>(1, size / 8)) sizes.push_back(size);
  sizes.push_back(most);
  return sizes;
}

void shrink_axis(TensorView* view, int axis, int64_t size) {
  if (view->present) view->shape[axis] = std::min(view->shape[axis], size);
}

/// The problem with fewer rows and keys; only shapes matter here.
AttentionParams shrunk(AttentionParams params, int64_t batch_size, int64_t seqlen_q, int64_t seqlen_kv) {
  for (TensorView* view : {&params.query, &params.out, &params.mask, &params.bias}) shrink_axis(view, 2, seqlen_q);
  for (TensorView* view : {&params.key, &params.value}) shrink_axis(view, 2, seqlen_kv);
  for (TensorView* view : {&params.mask, &params.bias}) shrink_axis(view, 3, seqlen_kv);
  shrink_axis(&params.lse, 2, seqlen_q);
  if (params.cu_seqlens_q.present) return params;  // batch_size counts sequences there, and a tensor's batch is 1
  for (TensorView* view : {&params.query, &params.key, &params.value, &params.out, &params.lse, &params.mask, &params.bias,
                           &params.kv_lengths, &params.query_lengths, &params.query_offsets, &params.alibi_slopes}) {
    shrink_axis(view, 0, batch_size);
  }
  return params;
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

Status largest_workspace(const plugin::Node& node, const DynamicPluginTensorDesc* inputs, const DeviceInfo& device,
                         size_t* bytes) {
  plugin::Problem largest, smallest;
  if (Status s = bind_at(node, inputs, &DynamicPluginTensorDesc::max, &largest); !s.ok()) return s;
  if (!bind_at(node, inputs, &DynamicPluginTensorDesc::min, &smallest).ok()) smallest = {};
  const AttentionParams& most = largest.params;
  const AttentionParams& least = smallest.params;
  *bytes = plugin::workspace_bytes(largest, device);
  for (const int64_t batch_size : sizes_between(least.query.shape[0], most.query.shape[0])) {
    for (const int64_t seqlen_q : sizes_between(least.query.shape[2], most.query.shape[2])) {
      for (const int64_t seqlen_kv : sizes_between(least.key.shape[2], most.key.shape[2])) {
        plugin::Problem problem = largest;
        problem.params = shrunk(most, batch_size, seqlen_q, seqlen_kv);
        *bytes = std::max(*bytes, plugin::workspace_bytes(problem, device));
      }
    }
  }
  return {};
}

}  // namespace fa::trt
