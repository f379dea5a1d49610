// SPDX-License-Identifier: Apache-2.0
// FlashAttention as ONNX Runtime sees it: one OrtCustomOp for each element type, type of output and cache, and execution provider
// (op.cpp), whose kernel is made once for a node and computes concurrently (kernel.cpp). Registered by register.cpp. Nothing
// throws into the runtime.
#pragma once

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <optional>
#include <string>

#include "bind.h"

namespace fa::plugin {

/// The API version that is asked for: ONNX Runtime 1.18 and every later one has it.
inline constexpr uint32_t kOrtApiVersion = 18;
inline constexpr const char* kDomain = "faexport";

struct FlashAttentionOp : OrtCustomOp {
  FlashAttentionOp(ONNXTensorElementDataType element_type, ONNXTensorElementDataType output_type,
                   ONNXTensorElementDataType cache_type, const char* provider, DeviceType device);

  ONNXTensorElementDataType element_type;
  ONNXTensorElementDataType output_type;  // of output: element_type, or for float8 any float type
  ONNXTensorElementDataType cache_type;   // of present_key and present_value: element_type, or that of a quantized cache
  const char* provider;
  DeviceType device;
};

/// From 1.28 on a shape may be set for any output; before, one for an output that the node lacks ends the process.
void allow_shapes_of_optional_outputs(bool allow);

/// A dtype of ours, or nothing where the operator has no such dtype.
std::optional<DType> dtype_of(ONNXTensorElementDataType type);
ONNXTensorElementDataType element_type_of(DType dtype);

/// null for kOk. The sentence is preceded by the operator's name.
OrtStatus* to_ort(const Status& status);

/// The body of a callback: what it throws becomes a status.
template <class Body>
OrtStatus* guarded(Body&& body) noexcept {
  try {
    return to_ort(body());
  } catch (const Ort::Exception& e) {
    return Ort::GetApi().CreateStatus(e.GetOrtErrorCode(), e.what());
  } catch (const std::exception& e) {
    return Ort::GetApi().CreateStatus(ORT_RUNTIME_EXCEPTION, e.what());
  }
}

// kernel.cpp
OrtStatus* create_kernel(const FlashAttentionOp& op, const OrtKernelInfo* info, void** kernel) noexcept;
OrtStatus* compute_kernel(const void* kernel, OrtKernelContext* context) noexcept;
void destroy_kernel(void* kernel) noexcept;

// infer_shapes.cpp
OrtStatus* infer_shapes(OrtShapeInferContext* context, bool optional_outputs) noexcept;

}  // namespace fa::plugin
