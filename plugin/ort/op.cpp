// SPDX-License-Identifier: Apache-2.0
// The declaration of FlashAttention for ONNX Runtime: three inputs of one type, a tail of any types that the attribute
// optional_inputs names, one output, and three optional ones in fixed places. See docs/onnxruntime.md for why a variadic tail.
#include "op.h"

#include <atomic>
#include <iterator>

namespace fa::plugin {
namespace {

constexpr size_t kNumRequired = 3;  // query, key, value; slot 3 is the variadic tail

std::atomic<bool> g_shapes_of_optional_outputs{false};

const FlashAttentionOp& self(const OrtCustomOp* op) { return *static_cast<const FlashAttentionOp*>(op); }

ONNXTensorElementDataType type_of_input(const OrtCustomOp* op, size_t index) {
  return index < kNumRequired ? self(op).element_type : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

ONNXTensorElementDataType type_of_output(const OrtCustomOp* op, size_t index) {
  const Output output = static_cast<Output>(index);
  if (output == Output::kLse) return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  return output == Output::kOutput ? self(op).output_type : self(op).cache_type;
}

OrtCustomOpInputOutputCharacteristic input_characteristic(const OrtCustomOp*, size_t index) {
  return index < kNumRequired ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_VARIADIC;
}

OrtCustomOpInputOutputCharacteristic output_characteristic(const OrtCustomOp*, size_t index) {
  return index == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
}

}  // namespace

FlashAttentionOp::FlashAttentionOp(ONNXTensorElementDataType element_type, ONNXTensorElementDataType output_type,
                                   ONNXTensorElementDataType cache_type, const char* provider, DeviceType device)
    : OrtCustomOp{},
      element_type(element_type),
      output_type(output_type),
      cache_type(cache_type),
      provider(provider),
      device(device) {
  version = kOrtApiVersion;
  GetName = [](const OrtCustomOp*) { return "FlashAttention"; };
  GetExecutionProviderType = [](const OrtCustomOp* op) { return self(op).provider; };
  GetInputTypeCount = [](const OrtCustomOp*) { return kNumRequired + 1; };
  GetInputType = type_of_input;
  GetInputCharacteristic = input_characteristic;
  GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  GetOutputTypeCount = [](const OrtCustomOp*) { return static_cast<size_t>(kNumOutputs); };
  GetOutputType = type_of_output;
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

namespace {

struct ElementType {
  ONNXTensorElementDataType type;
  DType dtype;
};
constexpr ElementType kElementTypes[] = {{ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, DType::kFloat32},
                                         {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, DType::kFloat16},
                                         {ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, DType::kBFloat16},
                                         {ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, DType::kBool},
                                         {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, DType::kInt32},
                                         {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, DType::kInt64},
                                         {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, DType::kInt8},
                                         {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, DType::kUInt8},
                                         {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN, DType::kFloat8E4M3}};
static_assert(std::size(kElementTypes) == kNumDTypes);

}  // namespace

std::optional<DType> dtype_of(ONNXTensorElementDataType type) {
  for (const ElementType& known : kElementTypes)
    if (known.type == type) return known.dtype;
  return std::nullopt;
}

ONNXTensorElementDataType element_type_of(DType dtype) {
  for (const ElementType& known : kElementTypes)
    if (known.dtype == dtype) return known.type;
  return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

OrtStatus* to_ort(const Status& status) {
  if (status.ok()) return nullptr;
  const OrtErrorCode code = status.code == StatusCode::kInvalidArgument ? ORT_INVALID_ARGUMENT
                            : status.code == StatusCode::kUnsupported   ? ORT_NOT_IMPLEMENTED
                                                                        : ORT_EP_FAIL;
  return Ort::GetApi().CreateStatus(code, ("FlashAttention: " + status.sentence).c_str());
}

}  // namespace fa::plugin
