// SPDX-License-Identifier: Apache-2.0
// Binding, preparing and running a call from Python (bound_call.h).
#include "bound_call.h"

#include <algorithm>

#include "fa/threads.h"

namespace fa::plugin {
namespace {

/// What explain() knows of a GPU that need not be there. SMs and the opt-in shared memory of A100, RTX 3090, RTX 4090, H100
/// (CUDA C++ programming guide, "Technical Specifications per Compute Capability").
std::optional<Device> device_by_name(const std::string& name) {
  if (name == "sm_80") return Device{DeviceType::kCuda, 80, 108, 163 * 1024};
  if (name == "sm_86") return Device{DeviceType::kCuda, 86, 82, 99 * 1024};
  if (name == "sm_89") return Device{DeviceType::kCuda, 89, 128, 99 * 1024};
  if (name == "sm_90") return Device{DeviceType::kCuda, 90, 132, 227 * 1024};
  return std::nullopt;
}

/// Memory for one call where the caller's framework gives none; on CUDA allocated and freed in the order of a stream.
class OwnMemory {
 public:
  OwnMemory(bool is_cuda, void* stream) : is_cuda_(is_cuda), stream_(stream) {}
  OwnMemory(const OwnMemory&) = delete;
  OwnMemory& operator=(const OwnMemory&) = delete;

  ~OwnMemory() {
#ifdef FA_WITH_CUDA
    if (cuda_ != nullptr && cudaFreeAsync(cuda_, static_cast<cudaStream_t>(stream_)) != cudaSuccess) cudaGetLastError();
#endif
  }

  Status allocate(size_t bytes, void** data) {
#ifdef FA_WITH_CUDA
    if (is_cuda_) {
      const cudaError_t error = cudaMallocAsync(&cuda_, bytes, static_cast<cudaStream_t>(stream_));
      *data = cuda_;
      if (error == cudaSuccess) return {};
      cudaGetLastError();  // the failure is told here and must not be found again by the caller
      return {StatusCode::kCudaError,
              "no device memory for a workspace of " + std::to_string(bytes) + " bytes: " + cudaGetErrorString(error) + "."};
    }
#endif
    heap_.resize(bytes);
    *data = heap_.data();
    return {};
  }

 private:
  [[maybe_unused]] bool is_cuda_;
  [[maybe_unused]] void* stream_;
  [[maybe_unused]] void* cuda_ = nullptr;
  std::vector<char> heap_;
};

bool is_empty(const Tensor& t) { return std::find(t.shape, t.shape + t.rank, 0) != t.shape + t.rank; }

bool is_given(const FaArray& array) {
  return array.object != nullptr || array.dlpack != nullptr || array.numpy != nullptr || array.dtype != nullptr;
}

[[noreturn]] void refuse_specification(const char* name) {
  throw Error(kFaValueError, std::string(name) + " is a specification without memory; it can be explained, but not computed");
}

constexpr const char* kGradientNames[kFaNumGradients] = {"output", "lse",     "d_output", "d_lse",  "d_query",
                                                         "d_key",  "d_value", "d_bias",   "d_sinks"};

}  // namespace

BoundCall::BoundCall(const Node& node, const FaArray* inputs, size_t num_inputs, uintptr_t stream)
    : node_(node), stream_(stream) {
  std::vector<Tensor> tensors;
  tensors.reserve(num_inputs);
  arrays_.reserve(num_inputs);
  for (size_t i = 0; i < num_inputs; ++i) {
    const char* name = i < node_.inputs.size() ? name_of(node_.inputs[i]) : "a surplus input";
    arrays_.push_back(array_from(name, inputs[i]));
    tensors.push_back(arrays_.back().tensor);
    check_device(name, arrays_.back());
  }
  check(plugin::bind(node_, tensors, &problem_));
}

void BoundCall::validate() const { check(fa::validate(problem_.params)); }

std::vector<FaOutput> BoundCall::outputs() const {
  std::vector<FaOutput> result;
  for (const Output output : node_.outputs) {
    const Tensor& t = problem_.outputs[static_cast<int>(output)];
    FaOutput& told = result.emplace_back(FaOutput{name_of(output), name_of(t.dtype), t.rank, {}});
    std::copy(t.shape, t.shape + t.rank, told.shape);
  }
  return result;
}

/// Binds the outputs' memory, row-major arrays of the shapes that outputs() tells, and chooses the kernel: the bytes of workspace
/// that run() needs.
size_t BoundCall::prepare(const FaArray* outputs, size_t num_outputs, const char* kernel) {
  if (num_outputs != node_.outputs.size())
    throw Error(kFaValueError, "expected " + std::to_string(node_.outputs.size()) + " outputs");
  check_inputs();
  for (size_t i = 0; i < num_outputs; ++i) take_output(i, outputs[i]);
  CudaDeviceGuard guard;
  check(plugin::plan(problem_, device_of_query(&guard), &plan_, kernel));
  return plan_.workspace_bytes;
}

/// Binds what the forward pass has written, and the gradients: the bytes of workspace that run() needs to compute them.
size_t BoundCall::prepare_backward(const FaArray* arrays, const char* kernel) {
  check_inputs();
  for (const auto& [output, which] : {std::pair{Output::kOutput, kFaOutput}, std::pair{Output::kLse, kFaLse}}) {
    if (node_.slot(output) < 0 || !is_given(arrays[which]))
      throw Error(kFaValueError, std::string(name_of(output)) + " is missing; a backward pass needs the forward's");
    set_output(&problem_, output, take_as(output, which, arrays));
  }
  const Problem bound = bind_gradients(arrays);
  const StepParams& given = bound.params;
  gradients_ = {given.out, {}, given.query, given.key, given.value, {}, {}};
  if (is_given(arrays[kFaDLse])) gradients_.d_lse = given.lse;
  if (is_given(arrays[kFaDBias])) gradients_.d_bias = given.bias;
  if (is_given(arrays[kFaDSinks])) gradients_.d_sinks = given.sinks;
  CudaDeviceGuard guard;
  check(plan_backward(problem_.params, gradients_, device_of_query(&guard), &backward_, kernel));
  return backward_.workspace_bytes;
}

/// Gradients of inputs have the layout of those inputs, and those of outputs that of the outputs: so they are bound as such, by
/// the rules of bind().
Problem BoundCall::bind_gradients(const FaArray* arrays) const {
  std::vector<Tensor> tensors;
  tensors.reserve(arrays_.size());
  for (const Array& array : arrays_) tensors.push_back(array.tensor);
  const std::pair<FaGradient, int> slots[] = {
      {kFaDQuery, 0}, {kFaDKey, 1}, {kFaDValue, 2}, {kFaDBias, slot_of_bias()}, {kFaDSinks, node_.slot(Input::kSinks)}};
  for (const auto& [which, slot] : slots) {
    if (which >= kFaDBias && !is_given(arrays[which])) continue;
    const Tensor gradient = take_gradient(which, slot, arrays[which]);  // refuses a slot that isn't there
    tensors[slot] = gradient;
  }
  Problem bound;
  check(plugin::bind(node_, tensors, &bound));
  set_output(&bound, Output::kOutput, take_as(Output::kOutput, kFaDOutput, arrays));
  if (is_given(arrays[kFaDLse])) set_output(&bound, Output::kLse, take_as(Output::kLse, kFaDLse, arrays));
  return bound;
}

/// The memory of an array of this output's shape, dtype and layout.
void* BoundCall::take_as(Output output, FaGradient which, const FaArray* arrays) const {
  return take_row_major(kGradientNames[which], problem_.outputs[static_cast<int>(output)], arrays[which]).tensor.data;
}

/// After prepare(). Without a workspace, where one is needed, it is allocated here, in the order of the stream.
void BoundCall::run(void* workspace, size_t workspace_bytes, int64_t num_threads) {
  if (num_threads < 0) throw Error(kFaValueError, "num_threads is " + std::to_string(num_threads) + "; expected 0 (all) or more");
  const bool is_backward = backward_.kernel != nullptr;
  CudaDeviceGuard guard;
  device_of_query(&guard);
  ExecutionContext context;
  context.stream = reinterpret_cast<void*>(stream_);
  Threads threads{static_cast<size_t>(num_threads)};
  if (num_threads == 0) threads.count = is_cuda() ? 1 : hardware_threads();
  context.parallel_for = Threads::run;
  context.pool = &threads;
  OwnMemory own(is_cuda(), context.stream);
  if (workspace != nullptr) {
    context.workspace = workspace;
    context.workspace_bytes = workspace_bytes;
  } else if (const size_t bytes = is_backward ? backward_.workspace_bytes : plan_.workspace_bytes; bytes > 0) {
    check(own.allocate(bytes, &context.workspace));
    context.workspace_bytes = bytes;
  }
  check(is_backward ? launch_backward(backward_, problem_.params, gradients_, context)
                    : plugin::launch(plan_, &problem_, context));
}

std::string BoundCall::explain(const std::string& name) const {
  if (const std::optional<Device> absent = device_by_name(name)) return fa::explain(problem_.params, *absent);
  if (name == "cpu" || (name.empty() && !is_cuda())) return fa::explain(problem_.params, Device{});
  if (!name.empty() && name != "cuda")
    throw Error(kFaValueError, "device is '" + name + "'; expected cpu, cuda, sm_80, sm_86, sm_89 or sm_90");
  Device device;
  int ordinal = arrays_[0].device_id;
  if (!is_cuda()) check(current_cuda_device(&ordinal));
  check(query_cuda_device(ordinal, &device));
  return fa::explain(problem_.params, device);
}

/// The query's device, made current where it is a GPU.
Device BoundCall::device_of_query(CudaDeviceGuard* guard) const {
  Device device;
  if (!is_cuda()) return device;
  check(guard->use(arrays_[0].device_id));
  check(query_cuda_device(arrays_[0].device_id, &device));
  return device;
}

void BoundCall::check_device(const char* name, const Array& array) const {
  const Array& query = arrays_[0];
  if (!array.is_spec && !query.is_spec && (array.device != query.device || array.device_id != query.device_id))
    throw Error(kFaValueError, std::string(name) + " is on another device than query");
}

/// An array of the shape, dtype and row-major layout of a result, on the query's device.
Array BoundCall::take_row_major(const char* name, const Tensor& want, const FaArray& given) const {
  const Array array = array_from(name, given);
  const Tensor& got = array.tensor;
  check_device(name, array);
  if (array.is_spec) refuse_specification(name);
  bool same = got.rank == want.rank && got.dtype == want.dtype;
  for (int axis = 0; same && axis < want.rank; ++axis)
    same =
        got.shape[axis] == want.shape[axis] && (want.shape[axis] <= 1 || is_empty(want) || got.stride[axis] == want.stride[axis]);
  if (!same) {
    const std::string shape = shape_text(want.shape, want.rank), its = shape_text(got.shape, got.rank);
    const bool alike = shape == its && got.dtype == want.dtype;
    throw Error(kFaValueError, std::string(name) + " is " + name_of(got.dtype) + " " + its + (alike ? " and not row-major" : "") +
                                   "; expected " + name_of(want.dtype) + " " + shape + ", row-major");
  }
  return array;
}

/// Binds the output in this slot.
void BoundCall::take_output(size_t slot, const FaArray& given) {
  const Output output = node_.outputs[slot];
  const Array array = take_row_major(name_of(output), problem_.outputs[static_cast<int>(output)], given);
  if (array.read_only) throw Error(kFaValueError, std::string(name_of(output)) + " is read-only");
  set_output(&problem_, output, array.tensor.data);
}

/// What is read has memory, and pages, to which new rows are written, have such as may change.
void BoundCall::check_inputs() const {
  const bool writes_pages = node_.words.cache == CacheMode::kPaged && !problem_.params.cache.new_key.empty();
  for (size_t i = 0; i < arrays_.size(); ++i) {
    const Input input = node_.inputs[i];
    const bool is_read = input != Input::kKvExtent && input != Input::kUnused;
    if (arrays_[i].is_spec && is_read) refuse_specification(name_of(input));
    if (writes_pages && arrays_[i].read_only && (input == Input::kPastKey || input == Input::kPastValue))
      throw Error(kFaValueError, std::string(name_of(input)) + " is read-only, but a paged cache is changed in place");
  }
}

/// The gradient of the input in a slot: of its shape, with strides of its own.
Tensor BoundCall::take_gradient(FaGradient which, int slot, const FaArray& given) const {
  const char* name = kGradientNames[which];
  const auto refuse = [&](const std::string& what) { throw Error(kFaValueError, std::string(name) + " " + what); };
  if (slot < 0) refuse("is given, but the call has no such input");
  const Array array = array_from(name, given);
  const Tensor &got = array.tensor, &want = arrays_[slot].tensor;
  check_device(name, array);
  if (array.is_spec) refuse_specification(name);
  if (array.read_only) refuse("is read-only");
  if (got.rank != want.rank || !std::equal(got.shape, got.shape + got.rank, want.shape))
    refuse("has shape " + shape_text(got.shape, got.rank) + "; expected that of " + name_of(node_.inputs[slot]) + ", " +
           shape_text(want.shape, want.rank));
  return got;
}

/// Of the input that is added to scores; -1 where there is none.
int BoundCall::slot_of_bias() const {
  const int bias = node_.slot(Input::kAttnBias), mask = node_.slot(Input::kAttnMask);
  if (bias >= 0) return bias;
  return mask >= 0 && arrays_[mask].tensor.dtype != DType::kBool ? mask : -1;
}

}  // namespace fa::plugin
