// SPDX-License-Identifier: Apache-2.0
// Reads Python arrays (arrays.h).
#include "arrays.h"

#include <stdexcept>

#include "cuda_device.h"
#include "dlpack.h"

namespace py = pybind11;

namespace fa::plugin {
namespace {

[[noreturn]] void refuse(const char* name, const std::string& what) { throw py::type_error(std::string(name) + " " + what); }

/// "float32, float16, … or …"
std::string known_dtypes() {
  std::string text = name_of(DType{});
  for (int i = 1; i < kNumDTypes; ++i) text += (i + 1 < kNumDTypes ? ", " : " or ") + std::string(name_of(static_cast<DType>(i)));
  return text;
}

Tensor empty_tensor(const char* name, DType dtype, size_t rank) {
  if (rank > 4) throw py::value_error(std::string(name) + " has rank " + std::to_string(rank) + "; expected 4 at most");
  Tensor tensor;
  tensor.dtype = dtype;
  tensor.rank = static_cast<int>(rank);
  return tensor;
}

Array from_numpy(const char* name, const py::array& array) {
  if (!array.dtype().attr("isnative").cast<bool>()) refuse(name, "has another byte order than this machine");
  Array result;
  result.owner = array;
  result.read_only = !array.writeable();
  result.tensor =
      empty_tensor(name, dtype_from(name, array.dtype().attr("name").cast<std::string>()), static_cast<size_t>(array.ndim()));
  result.tensor.data = const_cast<void*>(array.data());
  for (int i = 0; i < result.tensor.rank; ++i) {
    result.tensor.shape[i] = array.shape(i);
    if (array.strides(i) % array.itemsize() != 0) refuse(name, "has strides that are no multiple of its elements' size");
    result.tensor.stride[i] = array.strides(i) / array.itemsize();
  }
  return result;
}

DType dtype_from_dlpack(const char* name, const dlpack::DataType& type) {
  if (type.lanes == 1) {
    if (type.code == dlpack::kFloat && type.bits == 32) return DType::kFloat32;
    if (type.code == dlpack::kFloat && type.bits == 16) return DType::kFloat16;
    if (type.code == dlpack::kBfloat && type.bits == 16) return DType::kBFloat16;
    if (type.code == dlpack::kBool && type.bits == 8) return DType::kBool;
    if (type.code == dlpack::kInt && type.bits == 32) return DType::kInt32;
    if (type.code == dlpack::kInt && type.bits == 64) return DType::kInt64;
    if (type.code == dlpack::kInt && type.bits == 8) return DType::kInt8;
    if (type.code == dlpack::kUInt && type.bits == 8) return DType::kUInt8;
    if (type.code == dlpack::kFloat8E4M3 && type.bits == 8) return DType::kFloat8E4M3;
  }
  refuse(name, "has a dtype that the operator does not know; expected " + known_dtypes());
}

Array from_dlpack(const char* name, const py::handle& object, uintptr_t stream) {
  const auto [device_type, device_id] = object.attr("__dlpack_device__")().cast<std::pair<int, int>>();
  Array result;
  result.device_id = device_id;
  if (device_type == dlpack::kCuda || device_type == dlpack::kCudaManaged) {
    result.device = DeviceType::kCuda;
    CudaDeviceGuard guard;  // PyTorch exports tensors of the current device only
    if (const Status status = guard.use(device_id); !status.ok()) throw std::runtime_error(status.sentence);
    result.owner = object.attr("__dlpack__")(py::arg("stream") = stream == 0 ? 1 : stream);  // 1 is the legacy default stream
  } else if (device_type == dlpack::kCpu || device_type == dlpack::kCudaHost) {
    result.owner = object.attr("__dlpack__")();
  } else {
    refuse(name, "is neither in the CPU's nor in a CUDA device's memory (DLPack device " + std::to_string(device_type) + ")");
  }
  // The capsule keeps its name: its own destructor gives the tensor back.
  const auto* managed = static_cast<const dlpack::DLManagedTensor*>(PyCapsule_GetPointer(result.owner.ptr(), "dltensor"));
  if (!managed) throw py::error_already_set();
  const dlpack::DLTensor& t = managed->dl_tensor;
  result.tensor = empty_tensor(name, dtype_from_dlpack(name, t.dtype), static_cast<size_t>(t.ndim));
  result.tensor.data = t.data ? static_cast<char*>(t.data) + t.byte_offset : nullptr;
  int64_t row_major = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    result.tensor.shape[i] = t.shape[i];
    result.tensor.stride[i] = t.strides ? t.strides[i] : row_major;
    row_major *= t.shape[i];
  }
  return result;
}

Array from_spec(const char* name, const py::tuple& spec) {
  const auto shape = spec[0].cast<std::vector<int64_t>>();
  Array result;
  result.is_spec = true;
  const DType dtype = dtype_from(name, spec[1].cast<std::string>());
  empty_tensor(name, dtype, shape.size());
  result.tensor = contiguous(nullptr, dtype, shape.data(), shape.size());
  return result;
}

}  // namespace

DType dtype_from(const char* tensor_name, const std::string& dtype_name) {
  for (int i = 0; i < kNumDTypes; ++i)
    if (dtype_name == name_of(static_cast<DType>(i))) return static_cast<DType>(i);
  refuse(tensor_name, "is " + dtype_name + "; expected " + known_dtypes());
}

Array array_from(const char* name, const py::handle& object, uintptr_t stream) {
  if (py::isinstance<py::array>(object)) return from_numpy(name, py::reinterpret_borrow<py::array>(object));
  if (py::isinstance<py::tuple>(object) && py::len(object) == 2)
    return from_spec(name, py::reinterpret_borrow<py::tuple>(object));
  if (py::hasattr(object, "__dlpack__")) return from_dlpack(name, object, stream);
  refuse(name, "is a " + std::string(py::str(py::type::of(object).attr("__name__"))) +
                   "; expected an array with __dlpack__ (NumPy, PyTorch, CuPy …)");
}

}  // namespace fa::plugin
