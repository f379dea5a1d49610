// SPDX-License-Identifier: Apache-2.0
// RegisterCustomOps: what ONNX Runtime looks up in libfa_ort.so. The library stays loaded when the runtime closes it (it is
// linked with nodelete), because the CUDA runtime inside it leaves destructors with the host's threads.
#include <cstdio>

#include "op.h"

namespace fa::plugin {
namespace {

/// 1.31.1 -> 131.
int runtime_version(const OrtApiBase* base) {
  int major = 0, minor = 0;
  std::sscanf(base->GetVersionString(), "%d.%d", &major, &minor);
  return 100 * major + minor;
}

Ort::CustomOpDomain make_domain(bool with_quantized_caches) {
  constexpr ONNXTensorElementDataType kTypes[] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
                                                  ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16};
  constexpr ONNXTensorElementDataType kCacheTypes[] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8,
                                                       ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN};
  auto& ops = *new std::vector<FlashAttentionOp>;
  const auto add = [&](ONNXTensorElementDataType type, ONNXTensorElementDataType output, ONNXTensorElementDataType cache) {
    ops.emplace_back(type, output, cache, "CPUExecutionProvider", DeviceType::kCpu);
#ifdef FA_WITH_CUDA
    ops.emplace_back(type, output, cache, "CUDAExecutionProvider", DeviceType::kCuda);
    // The provider's name as a plugin library.
    ops.emplace_back(type, output, cache, "CudaPluginExecutionProvider", DeviceType::kCuda);
#endif
  };
  for (const ONNXTensorElementDataType type : kTypes) add(type, type, type);
  constexpr ONNXTensorElementDataType kFloat8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN;
  for (const ONNXTensorElementDataType output : kTypes) add(kFloat8, output, kFloat8);
  add(kFloat8, kFloat8, kFloat8);
  // Quantized caches: where several kernels fit a node's inputs, the runtime takes the outputs' types of the first.
  for (const ONNXTensorElementDataType type : kTypes)
    for (const ONNXTensorElementDataType cache : kCacheTypes)
      if (with_quantized_caches) add(type, type, cache);
  Ort::CustomOpDomain domain(kDomain);
  for (const FlashAttentionOp& op : ops) domain.Add(&op);
  return domain;
}

/// Never freed: the runtime's sessions may outlive this library's static objects, and the runtime itself may be gone before them.
const Ort::CustomOpDomain& domain(bool with_quantized_caches) {
  static const Ort::CustomOpDomain& made = *new Ort::CustomOpDomain(make_domain(with_quantized_caches));
  return made;
}

}  // namespace
}  // namespace fa::plugin

extern "C" __attribute__((visibility("default"))) OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                                                            const OrtApiBase* base) {
  using namespace fa::plugin;
  const OrtApi* api = base->GetApi(kOrtApiVersion);
  if (!api) {
    const std::string sentence = std::string("faexport needs ONNX Runtime 1.18 or later; this is ") + base->GetVersionString();
    return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED, sentence.c_str());
  }
  Ort::InitApi(api);
  const bool tells_optional_outputs = runtime_version(base) >= 128;
  allow_shapes_of_optional_outputs(tells_optional_outputs);
  return guarded([&]() -> fa::Status {
    Ort::UnownedSessionOptions(options).Add(domain(tells_optional_outputs));
    return {};
  });
}
