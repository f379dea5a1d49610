// SPDX-License-Identifier: Apache-2.0
// FlashAttention as a TensorRT plugin (IPluginV3: Core, Build, Runtime). Made by creator.cpp, driven by TensorRT's builder and
// runtime. NOTE: one library serves TensorRT 10.0 to 11.4 because it calls none of TensorRT's own objects but IExprBuilder;
// loggers, the registry and plugin resources changed their virtual tables in 11.
#pragma once

#include <NvInferRuntime.h>

#include <string>
#include <vector>

#include "bind.h"
#include "fields.h"

namespace fa::trt {

inline constexpr const char* kPluginName = "FlashAttention";
inline constexpr const char* kPluginVersion = "1";
inline constexpr const char* kPluginNamespace = "";

/// Writes one line to stderr: "[faplugin] FlashAttention 'node': sentence".
void log_error(const std::string& node_name, const std::string& sentence) noexcept;

/// One node. TensorRT clones it freely: an object per network, per format tried, per execution context. Objects share nothing.
class FlashAttentionPlugin final : public nvinfer1::IPluginV3,
                                   public nvinfer1::IPluginV3OneCore,
                                   public nvinfer1::IPluginV3OneBuild,
                                   public nvinfer1::IPluginV3OneRuntime {
 public:
  /// `node_name` is for the log; `node` is made from state.attributes. May throw std::bad_alloc.
  FlashAttentionPlugin(std::string node_name, plugin::Node node, PluginState state);
  FlashAttentionPlugin(const FlashAttentionPlugin&) = delete;
  FlashAttentionPlugin& operator=(const FlashAttentionPlugin&) = delete;

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  const char* getPluginName() const noexcept override { return kPluginName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

  int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(node_.outputs.size()); }
  int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t num_outputs, const nvinfer1::DataType* input_types,
                             int32_t num_inputs) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t num_inputs, const nvinfer1::DimsExprs* shape_inputs,
                          int32_t num_shape_inputs, nvinfer1::DimsExprs* outputs, int32_t num_outputs,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t pos, const nvinfer1::DynamicPluginTensorDesc* in_out, int32_t num_inputs,
                                 int32_t num_outputs) noexcept override;
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t num_inputs,
                          const nvinfer1::DynamicPluginTensorDesc* out, int32_t num_outputs) noexcept override;
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                          const nvinfer1::DynamicPluginTensorDesc* outputs, int32_t num_outputs) const noexcept override;
  const char* getTimingCacheID() noexcept override { return description_.c_str(); }
  const char* getMetadataString() noexcept override { return description_.c_str(); }

  /// Only TensorRT's default tactic is offered for timing: 0, the kernel is chosen anew for each shape. Tactic n > 0 forces the
  /// n-th CUDA kernel of the dispatch table; the conformance host uses it.
  int32_t setTactic(int32_t tactic) noexcept override;
  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t num_inputs, const nvinfer1::PluginTensorDesc* out,
                        int32_t num_outputs) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* input_desc, const nvinfer1::PluginTensorDesc* output_desc,
                  const void* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

 private:
  /// Runs a method's body: 0, or -1 after a line on the log. Catches what the binding may throw (std::bad_alloc).
  template <class Body>
  int32_t guarded(const char* method, Body body) const noexcept;
  Status check_counts(int32_t num_inputs, int32_t num_outputs) const;
  Status check_outputs(const plugin::Problem& problem, const nvinfer1::PluginTensorDesc* out) const;
  bool is_configured() const;
  const char* forced_kernel() const;
  /// The GPU that is planned for: the current one, or what is left on it of the one that the engine was built on.
  Status planned_device(Device* device) const;

  const std::string node_name_;
  const plugin::Node node_;
  PluginState state_;
  const std::string description_;
  int32_t tactic_ = 0;
  Device device_;                                  // of the context's thread; type kCpu until the first shape is known
  std::vector<nvinfer1::PluginField> serialized_;  // point into state_
  nvinfer1::PluginFieldCollection serialized_collection_{};
};

}  // namespace fa::trt
