// SPDX-License-Identifier: Apache-2.0
// The declaration of FlashAttention for ONNX Runtime: three inputs of one type, a tail of any types that the attribute
// optional_inputs names, one output, and three optional ones in fixed places. See docs/onnxruntime.md for why a variadic tail.
#include "op.h"

#include <atomic>

namespace fa::plugin {
namespace {

constexpr size_t kNumRequired = 3;  // query, key, value; slot 3 is the variadic tail

std::atomic<bool> g_shapes_of_optional_outputs{false};

const FlashAttentionOp& self(const OrtCustomOp* op) { return *static_cast<const FlashAttentionOp*>(op); }

ONNXTensorElementDataType input_type(const OrtCustomOp* op, size_t index) {
  return index < kNumRequired ? self(op).element_type : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

ONNXTensorElementDataType output_type(const OrtCustomOp* op, size_t index) {
  const Output output = static_cast<Output>(index);
  if (output == Output::kLse) return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  return output == Output::kOutput ? self(op).element_type : self(op).cache_type;
}

OrtCustomOpInputOutputCharacteristic input_characteristic(const OrtCustomOp*, size_t index) {
  return index < kNumRequired ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_VARIADIC;
}

OrtCustomOpInputOutputCharacteristic output_characteristic(const OrtCustomOp*, size_t index) {
  return index == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
}

}  // namespace

FlashAttentionOp::FlashAttentionOp(ONNXTensorElementDataType element_type, ONNXTensorElementDataType cache_type,
                                   const char* provider, DeviceType device)
    : OrtCustomOp{}, element_type(element_type), cache_type(cache_type), provider(provider), device(device) {
  version = kOrtApiVersion;
  GetName = [](const OrtCustomOp*) { return "FlashAttention"; };
  GetExecutionProviderType = [](const OrtCustomOp* op) { return self(op).provider; };
  GetInputTypeCount = [](const OrtCustomOp*) { return kNumRequired + 1; };
  GetInputType = input_type;
  GetInputCharacteristic = input_characteristic;
  GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  GetOutputTypeCount = [](const OrtCustomOp*) { return static_cast<size_t>(kNumOutputs); };
  GetOutputType = output_type;
  GetOutputCharacteristic = output_characteristic;
  GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
  GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
  GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  GetStartVersion = [](const OrtCustomOp*) { return 1; };
  GetEndVersion = [](const OrtCustomOp*) { return 1; };
  CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** kernel) -> OrtStatusPtr {
    return create_kernel(self(op), info, kernel);
  };
  KernelComputeV2 = [](void* kernel, OrtKernelContext* context) -> OrtStatusPtr { return compute_kernel(kernel, context); };
  KernelDestroy = [](void* kernel) { destroy_kernel(kernel); };
  InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) -> OrtStatusPtr {
    return infer_shapes(context, g_shapes_of_optional_outputs);
  };
}

void allow_shapes_of_optional_outputs(bool allow) { g_shapes_of_optional_outputs = allow; }

std::optional<DType> dtype_of(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return DType::kFloat32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return DType::kFloat16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return DType::kBFloat16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL:
      return DType::kBool;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32:
      return DType::kInt32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
      return DType::kInt64;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8:
      return DType::kInt8;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8:
      return DType::kUInt8;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN:
      return DType::kFloat8E4M3;
    default:
      return std::nullopt;
  }
}

OrtStatus* to_ort(const Status& status) {
  if (status.ok()) return nullptr;
  const OrtErrorCode code = status.code == StatusCode::kInvalidArgument ? ORT_INVALID_ARGUMENT
                            : status.code == StatusCode::kUnsupported   ? ORT_NOT_IMPLEMENTED
                                                                        : ORT_EP_FAIL;
  return Ort::GetApi().CreateStatus(code, ("FlashAttention: " + status.sentence).c_str());
}

}  // namespace fa::plugin
