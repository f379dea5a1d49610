// SPDX-License-Identifier: Apache-2.0
// The kernel of one FlashAttention node: attributes read and checked once, then bind and run for each call. Compute is const and
// is called from several threads at once. On CUDA it enqueues on the session's stream and waits for nothing.
#include <algorithm>
#include <memory>

#include "cuda_device.h"
#include "op.h"
#include "workspace.h"

namespace fa::plugin {
namespace {

struct Kernel {
  Node node;
  std::vector<DType> dtypes;  // of the inputs
  DeviceType device;
  StreamMemories memories;
};

// Getters of one attribute: true where the node has it with this type.
bool get(const OrtKernelInfo* info, const char* name, int64_t* value) {
  return Ort::Status{Ort::GetApi().KernelInfoGetAttribute_int64(info, name, value)}.IsOK();
}
bool get(const OrtKernelInfo* info, const char* name, float* value) {
  return Ort::Status{Ort::GetApi().KernelInfoGetAttribute_float(info, name, value)}.IsOK();
}
bool get(const OrtKernelInfo* info, const char* name, std::string* value) {
  size_t bytes = 0;
  if (!Ort::Status{Ort::GetApi().KernelInfoGetAttribute_string(info, name, nullptr, &bytes)}.IsOK()) return false;
  value->resize(bytes);
  if (!Ort::Status{Ort::GetApi().KernelInfoGetAttribute_string(info, name, value->data(), &bytes)}.IsOK()) return false;
  value->resize(bytes > 0 ? bytes - 1 : 0);  // without the NUL
  return true;
}
bool get(const OrtKernelInfo* info, const char* name, std::vector<int64_t>* value) {
  size_t size = 0;
  if (!Ort::Status{Ort::GetApi().KernelInfoGetAttributeArray_int64(info, name, nullptr, &size)}.IsOK()) return false;
  value->resize(size);
  return size == 0 || Ort::Status{Ort::GetApi().KernelInfoGetAttributeArray_int64(info, name, value->data(), &size)}.IsOK();
}
bool get(const OrtKernelInfo* info, const char* name, std::vector<float>* value) {
  size_t size = 0;
  if (!Ort::Status{Ort::GetApi().KernelInfoGetAttributeArray_float(info, name, nullptr, &size)}.IsOK()) return false;
  value->resize(size);
  return size == 0 || Ort::Status{Ort::GetApi().KernelInfoGetAttributeArray_float(info, name, value->data(), &size)}.IsOK();
}

template <class... T>
bool has_any(const OrtKernelInfo* info, const char* name, T... values) {
  return (get(info, name, &values) || ...);
}

/// Has the node an attribute of this name, of any type?
bool has_attribute(const OrtKernelInfo* info, const char* name) {
  return has_any(info, name, int64_t{}, float{}, std::string{}, std::vector<int64_t>{}, std::vector<float>{});
}

/// Reads an attribute where the node has it. NOTE: the runtime tells an absent one and one of another type by the same code.
template <class T>
Status read(const OrtKernelInfo* info, const char* name, const char* type, T* value) {
  T given{};
  if (get(info, name, &given)) {
    *value = std::move(given);
    return {};
  }
  return has_attribute(info, name) ? invalid(std::string("the attribute ") + name + " is of another type; expected " + type)
                                   : Status{};
}

Status read_attributes(const OrtKernelInfo* info, Attributes* attributes) {
#define FA_ATTRIBUTE(type, name, value, meaning) \
  if (Status s = read(info, #name, #type, &attributes->name); !s.ok()) return s;
#include "fa/attributes.def"
#undef FA_ATTRIBUTE
  return {};
}

/// The types of the inputs, which the runtime knows before any call.
Status check_types(const Ort::ConstKernelInfo& info, const Node& node, std::vector<DType>* dtypes) {
  const size_t count = info.GetInputCount();
  if (Status s = check_num_inputs(node, count); !s.ok()) return s;
  DType query = DType::kFloat32;
  for (size_t i = 0; i < count; ++i) {
    const Ort::TypeInfo type_info = info.GetInputTypeInfo(i);
    const std::optional<DType> dtype = dtype_of(type_info.GetTensorTypeAndShapeInfo().GetElementType());
    if (i == 0 && dtype) query = *dtype;
    dtypes->push_back(dtype.value_or(DType::kFloat32));
    if (node.inputs[i] == Input::kUnused) continue;
    if (Status s = check_dtype(node.inputs[i], dtype, query); !s.ok()) return s;
  }
  if (Status s = check_output_dtype(node, query); !s.ok()) return s;
  // The runtime has chosen the output's type when it loaded the model, and allocates by it.
  const Ort::TypeInfo output_info = info.GetOutputTypeInfo(0);
  const std::optional<DType> output = dtype_of(output_info.GetTensorTypeAndShapeInfo().GetElementType());
  const DType expected = dtype_of(node, Output::kOutput, query, query);
  if (output != expected)
    return invalid(std::string("output is ") + (output ? name_of(*output) : "of another dtype") + "; expected " +
                   name_of(expected) + " beside a query of " + name_of(query) + " and output_dtype '" +
                   node.attributes.output_dtype + "'");
  return {};
}

/// The runtime knows outputs by place, TensorRT by the attribute: the two must say the same.
Status check_outputs(const Ort::ConstKernelInfo& info, const Node& node) {
  const size_t count = info.GetOutputCount();
  for (int i = 0; i < kNumOutputs; ++i) {
    const Output output = static_cast<Output>(i);
    const bool there = static_cast<size_t>(i) < count && !info.GetOutputName(i).empty();
    const bool named = node.slot(output) >= 0;
    if (there != named)
      return invalid(std::string("the node has ") + (there ? "the output " : "no output ") + name_of(output) +
                     ", but optional_outputs " + (named ? "names it ('" : "doesn't name it ('") +
                     node.attributes.optional_outputs + "')");
  }
  return {};
}

Status create(const FlashAttentionOp& op, const Ort::ConstKernelInfo& info, std::unique_ptr<Kernel>* kernel) {
  *kernel = std::make_unique<Kernel>();
  (*kernel)->device = op.device;
  Attributes attributes;
  if (Status s = read_attributes(info, &attributes); !s.ok()) return s;
  if (Status s = make_node(attributes, &(*kernel)->node); !s.ok()) return s;
  if (Status s = check_types(info, (*kernel)->node, &(*kernel)->dtypes); !s.ok()) return s;
  return check_outputs(info, (*kernel)->node);
}

Tensor tensor_of(const Ort::ConstValue& value, DType dtype) {
  const Ort::TensorTypeAndShapeInfo info = value.GetTensorTypeAndShapeInfo();
  const size_t rank = info.GetDimensionsCount();
  int64_t shape[4] = {};
  Ort::ThrowOnError(Ort::GetApi().GetDimensions(info, shape, std::min<size_t>(rank, 4)));
  return contiguous(const_cast<void*>(value.GetTensorRawData()), dtype, shape, rank);
}

void parallel_for(void* pool, size_t num_tasks, void (*task)(void* arg, size_t i), void* arg) {
  Ort::Status failed{Ort::GetApi().KernelContext_ParallelFor(static_cast<OrtKernelContext*>(pool), task, num_tasks, 0, arg)};
  if (failed.IsOK()) return;
  for (size_t i = 0; i < num_tasks; ++i) task(arg, i);
}

/// How the session's other nodes multiply float32 matrices: the option use_tf32 of its CUDA provider, which is on by default.
Float32Precision session_precision(const OrtKernelContext* context) {
  constexpr int kCudaResourceVersion = 3, kUseTf32 = 10011;  // of onnxruntime's cuda_resource.h, which not all packages have
  void* use_tf32 = nullptr;
  const Ort::Status status{Ort::GetApi().KernelContext_GetResource(context, kCudaResourceVersion, kUseTf32, &use_tf32)};
  return !status.IsOK() || use_tf32 != nullptr ? Float32Precision::kTf32 : Float32Precision::kTf32x3;
}

Status compute(const Kernel& kernel, OrtKernelContext* raw_context) {
  const Ort::KernelContext context(raw_context);
  std::vector<Tensor> inputs(kernel.node.inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i) inputs[i] = tensor_of(context.GetInput(i), kernel.dtypes[i]);
  Problem problem;
  if (Status s = plugin::bind(kernel.node, inputs, &problem); !s.ok()) return s;
  for (const Output output : kernel.node.outputs) {
    const Tensor& tensor = problem.outputs[static_cast<int>(output)];
    Ort::UnownedValue value = context.GetOutput(static_cast<size_t>(output), tensor.shape, static_cast<size_t>(tensor.rank));
    set_output(&problem, output, value.GetTensorMutableRawData());
  }
  Device device;
  ExecutionContext execution;
  CudaDeviceGuard guard;
  int device_id = 0;
  if (kernel.device == DeviceType::kCpu) {
    execution.parallel_for = parallel_for;
    execution.pool = raw_context;
  } else {
    device_id = context.GetInput(0).GetTensorMemoryInfo().GetDeviceId();
    if (Status s = guard.use(device_id); !s.ok()) return s;
    if (Status s = query_cuda_device(device_id, &device); !s.ok()) return s;
    execution.stream = context.GetGPUComputeStream();
    const bool asks_session = kernel.node.attributes.float32_precision.empty() && kernel.dtypes[0] == DType::kFloat32;
    if (asks_session) problem.params.float32_precision = session_precision(raw_context);
  }
  Plan plan;
  if (Status s = plugin::plan(problem, device, &plan); !s.ok()) return s;
  Workspace workspace;
  if (Status s = workspace.reserve(context, kernel.memories, device, device_id, plan.workspace_bytes, &execution); !s.ok())
    return s;
  return launch(plan, &problem, execution);
}

}  // namespace

OrtStatus* create_kernel(const FlashAttentionOp& op, const OrtKernelInfo* info, void** kernel) noexcept {
  return guarded([&]() -> Status {
    const Ort::ConstKernelInfo node(info);
    std::unique_ptr<Kernel> created;
    Status status = create(op, node, &created);
    if (status.ok()) *kernel = created.release();
    if (!status.ok()) status.sentence = "node '" + node.GetNodeName() + "': " + status.sentence;
    return status;
  });
}

OrtStatus* compute_kernel(const void* kernel, OrtKernelContext* context) noexcept {
  return guarded([&] { return compute(*static_cast<const Kernel*>(kernel), context); });
}

void destroy_kernel(void* kernel) noexcept { delete static_cast<Kernel*>(kernel); }

}  // namespace fa::plugin
