// SPDX-License-Identifier: Apache-2.0
// faplugin._native: a Call is one call of the operator, bound to its inputs. Python allocates the outputs (and the workspace)
// with the caller's own framework and hands them over as arrays; nothing is copied. Used by faplugin/_attention.py alone.
#include <algorithm>
#include <optional>
#include <thread>

#include "arrays.h"
#include "cuda_device.h"
#include "fa/threads.h"

namespace py = pybind11;

namespace fa::plugin {
namespace {

void check(const Status& status) {
  if (status.ok()) return;
  if (status.code == StatusCode::kInvalidArgument) throw py::value_error(status.sentence);
  throw std::runtime_error(status.sentence);
}

template <class T>
T attribute_from(const std::string& name, const char* type, const py::handle& given) {
  try {
    return given.cast<T>();
  } catch (const py::cast_error&) {
    throw py::type_error(name + " is " + std::string(py::repr(given)) + "; expected " + type);
  }
}

/// Sets attributes by name; raises TypeError for one that attributes.def lacks, or of another type.
Attributes attributes_from(const py::dict& given) {
  Attributes attributes;
  for (const auto& item : given) {
    const std::string key = item.first.cast<std::string>();
    bool known = false;
#define FA_ATTRIBUTE(type, name, value, meaning)                                          \
  if (key == #name) {                                                                     \
    attributes.name = attribute_from<decltype(attributes.name)>(key, #type, item.second); \
    known = true;                                                                         \
  }
#include "fa/attributes.def"
#undef FA_ATTRIBUTE
    if (!known) throw py::type_error("FlashAttention has no attribute '" + key + "'");
  }
  return attributes;
}

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

class Call {
 public:
  Call(const py::dict& attributes, const py::list& inputs, uintptr_t stream) : stream_(stream) {
    check(make_node(attributes_from(attributes), &node_));
    std::vector<Tensor> tensors;
    for (size_t i = 0; i < inputs.size(); ++i) {
      const char* name = i < node_.inputs.size() ? name_of(node_.inputs[i]) : "a surplus input";
      arrays_.push_back(array_from(name, inputs[i], stream));
      tensors.push_back(arrays_.back().tensor);
      check_device(name, arrays_.back());
    }
    check(plugin::bind(node_, tensors, &problem_));
    check(validate(problem_.params));
  }

  /// [(name, shape, dtype name)] in the node's order.
  std::vector<std::tuple<std::string, std::vector<int64_t>, std::string>> outputs() const {
    std::vector<std::tuple<std::string, std::vector<int64_t>, std::string>> result;
    for (const Output output : node_.outputs) {
      const Tensor& t = problem_.outputs[static_cast<int>(output)];
      result.emplace_back(name_of(output), std::vector<int64_t>(t.shape, t.shape + t.rank), name_of(t.dtype));
    }
    return result;
  }

  std::string device() const { return is_cuda() ? "cuda" : "cpu"; }

  /// Binds the outputs' memory and chooses the kernel: the bytes of workspace that run() needs.
  size_t prepare(const py::list& outputs, const std::string& kernel) {
    take_outputs(outputs);
    CudaDeviceGuard guard;
    check(plugin::plan(problem_, device_of_query(&guard), &plan_, kernel.empty() ? nullptr : kernel.c_str()));
    return plan_.workspace_bytes;
  }

  /// After prepare(). Without a workspace, where one is needed, it is allocated here, in the order of the stream.
  void run(const py::object& workspace, int64_t num_threads) {
    if (num_threads < 0) throw py::value_error("num_threads is " + std::to_string(num_threads) + "; expected 0 (all) or more");
    CudaDeviceGuard guard;
    device_of_query(&guard);
    ExecutionContext context;
    context.stream = reinterpret_cast<void*>(stream_);
    Threads threads{num_threads > 0 ? static_cast<size_t>(num_threads) : std::max(1u, std::thread::hardware_concurrency())};
    context.parallel_for = Threads::run;
    context.pool = &threads;
    Array memory;  // of the workspace; its owner lives until the kernels are enqueued
    OwnMemory own(is_cuda(), context.stream);
    if (!workspace.is_none()) {
      memory = array_from("the workspace", workspace, stream_);
      context.workspace = memory.tensor.data;
      context.workspace_bytes = static_cast<size_t>(memory.tensor.shape[0] * size_of(memory.tensor.dtype));
    } else if (plan_.workspace_bytes > 0) {
      check(own.allocate(plan_.workspace_bytes, &context.workspace));
      context.workspace_bytes = plan_.workspace_bytes;
    }
    Status status;
    {
      py::gil_scoped_release release;
      status = plugin::launch(plan_, problem_, context);
    }
    check(status);
  }

  std::string explain(const std::string& name) const {
    if (const std::optional<Device> absent = device_by_name(name)) return fa::explain(problem_.params, *absent);
    if (name == "cpu" || (name.empty() && !is_cuda())) return fa::explain(problem_.params, Device{});
    if (!name.empty() && name != "cuda")
      throw py::value_error("device is '" + name + "'; expected cpu, cuda, sm_80, sm_86, sm_89 or sm_90");
    Device device;
    int ordinal = arrays_[0].device_id;
    if (!is_cuda()) check(current_cuda_device(&ordinal));
    check(query_cuda_device(ordinal, &device));
    return fa::explain(problem_.params, device);
  }

 private:
  bool is_cuda() const { return arrays_[0].device == DeviceType::kCuda; }

  /// The query's device, made current where it is a GPU.
  Device device_of_query(CudaDeviceGuard* guard) const {
    Device device;
    if (!is_cuda()) return device;
    check(guard->use(arrays_[0].device_id));
    check(query_cuda_device(arrays_[0].device_id, &device));
    return device;
  }

  void check_device(const char* name, const Array& array) const {
    const Array& query = arrays_[0];
    if (!array.is_spec && !query.is_spec && (array.device != query.device || array.device_id != query.device_id))
      throw py::value_error(std::string(name) + " is on another device than query");
  }

  /// Binds the outputs' memory: row-major arrays of the shapes that outputs() tells.
  void take_outputs(const py::list& outputs) {
    if (outputs.size() != node_.outputs.size())
      throw py::value_error("expected " + std::to_string(node_.outputs.size()) + " outputs");
    if (arrays_[0].is_spec) throw py::value_error("query is a specification without memory; it can't be computed");
    for (size_t i = 0; i < outputs.size(); ++i) {
      const Output output = node_.outputs[i];
      const Tensor& want = problem_.outputs[static_cast<int>(output)];
      kept_.push_back(array_from(name_of(output), outputs[i], stream_));
      const Tensor& got = kept_.back().tensor;
      check_device(name_of(output), kept_.back());
      bool same = got.rank == want.rank && got.dtype == want.dtype;
      for (int axis = 0; same && axis < want.rank; ++axis)
        same = got.shape[axis] == want.shape[axis] &&
               (want.shape[axis] <= 1 || is_empty(want) || got.stride[axis] == want.stride[axis]);
      if (!same)
        throw py::value_error(std::string(name_of(output)) + " has another shape, dtype or layout than the row-major result");
      if (kept_.back().read_only) throw py::value_error(std::string(name_of(output)) + " is read-only");
      for (size_t j = 0; j < arrays_.size(); ++j)
        if (overlap(got, arrays_[j].tensor) && !is_in_place(output, got, node_.inputs[j], arrays_[j].tensor))
          throw py::value_error(std::string(name_of(output)) + " shares memory with " + name_of(node_.inputs[j]) +
                                "; give it memory of its own");
      set_output(&problem_, output, got.data);
    }
  }

  static bool is_empty(const Tensor& t) { return std::find(t.shape, t.shape + t.rank, 0) != t.shape + t.rank; }

  /// A present may be the very memory of its past, unless rows are appended: then it is larger.
  bool is_in_place(Output output, const Tensor& present, Input input, const Tensor& past) const {
    const bool is_pair = (output == Output::kPresentKey && input == Input::kPastKey) ||
                         (output == Output::kPresentValue && input == Input::kPastValue);
    bool is_same = is_pair && node_.attributes.cache != "append" && present.data == past.data;
    for (int i = 0; is_same && i < present.rank; ++i)
      is_same = present.shape[i] == past.shape[i] && (present.shape[i] <= 1 || present.stride[i] == past.stride[i]);
    return is_same;
  }

  /// Do the spans of memory from the first to the last element of each meet?
  static bool overlap(const Tensor& a, const Tensor& b) {
    const auto [a_begin, a_end] = span(a);
    const auto [b_begin, b_end] = span(b);
    return a_begin < b_end && b_begin < a_end;
  }

  static std::pair<uintptr_t, uintptr_t> span(const Tensor& t) {
    if (is_empty(t)) return {0, 0};
    int64_t first = 0, last = 0;  // elements
    for (int i = 0; i < t.rank; ++i) (t.stride[i] < 0 ? first : last) += (t.shape[i] - 1) * t.stride[i];
    const auto begin = reinterpret_cast<uintptr_t>(t.data);
    const int64_t size = size_of(t.dtype);
    return {begin + first * size, begin + (last + 1) * size};
  }

  Node node_;
  std::vector<Array> arrays_;  // the inputs
  std::vector<Array> kept_;    // the outputs
  Problem problem_;
  Plan plan_;
  uintptr_t stream_;
};

}  // namespace
}  // namespace fa::plugin

PYBIND11_MODULE(_native, m) {
  using fa::plugin::Call;
  m.doc() = "The operator for Python; used through faplugin.";
#ifdef FA_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
  py::list inputs;  // names, in the order of inputs.def
  for (int i = 0; i < fa::plugin::kNumInputs; ++i) inputs.append(fa::plugin::name_of(static_cast<fa::plugin::Input>(i)));
  m.attr("inputs") = py::tuple(inputs);
  py::class_<Call>(m, "Call")
      .def(py::init<const py::dict&, const py::list&, uintptr_t>(), py::arg("attributes"), py::arg("inputs"),
           py::arg("stream") = 0)
      .def_property_readonly("outputs", &Call::outputs)
      .def_property_readonly("device", &Call::device)
      .def("prepare", &Call::prepare, py::arg("outputs"), py::arg("kernel") = "")
      .def("run", &Call::run, py::arg("workspace") = py::none(), py::arg("num_threads") = 0)
      .def("explain", &Call::explain, py::arg("device") = "");
}
