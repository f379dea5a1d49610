// SPDX-License-Identifier: Apache-2.0
// Reads Python's arrays (arrays.h).
#include "arrays.h"

#include <iterator>

namespace fa::plugin {
namespace {

[[noreturn]] void refuse(const char* name, const std::string& what) { throw Error(kFaTypeError, std::string(name) + " " + what); }

/// For a dtype that no input of the operator has: what to convert it to depends on what the array is.
[[noreturn]] void refuse_dtype(const char* name, const std::string& dtype) {
  refuse(name,
         "is " + dtype +
             ", which the operator does not read; convert it: numbers to float32, float16 or bfloat16, positions and lengths to "
             "int64 or int32, masks to bool");
}

/// "float64", also for what is no DType.
std::string dtype_name(const dlpack::DataType& type) {
  constexpr const char* kKinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
  const std::string bits = std::to_string(type.bits), lanes = type.lanes == 1 ? "" : "x" + std::to_string(type.lanes);
  return (type.code < std::size(kKinds) ? kKinds[type.code] : "DLPack type " + std::to_string(type.code) + " of bits ") + bits +
         lanes;
}

Tensor empty_tensor(const char* name, DType dtype, int32_t rank) {
  if (rank > 4) throw Error(kFaValueError, std::string(name) + " has rank " + std::to_string(rank) + "; expected 4 at most");
  Tensor tensor;
  tensor.dtype = dtype;
  tensor.rank = rank;
  return tensor;
}

/// An array without elements may have any strides, of NumPy all 0. Here a stride of 0 tells an axis that is broadcast, which of a
/// gradient takes a sum, so it becomes row-major.
void settle_strides(Tensor* tensor) {
  for (int i = 0; i < tensor->rank; ++i) {
    if (tensor->shape[i] != 0) continue;
    *tensor = contiguous(tensor->data, tensor->dtype, tensor->shape, static_cast<size_t>(tensor->rank));
    return;
  }
}

DType dtype_by_name(const char* name, const std::string& dtype) {
  for (int i = 0; i < kNumDTypes; ++i)
    if (dtype == name_of(static_cast<DType>(i))) return static_cast<DType>(i);
  refuse_dtype(name, dtype);
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
  refuse_dtype(name, dtype_name(type));
}

Array from_dlpack(const char* name, const dlpack::DLTensor& t) {
  Array result;
  result.device_id = t.device.device_id;
  if (t.device.device_type == dlpack::kCuda || t.device.device_type == dlpack::kCudaManaged) result.device = DeviceType::kCuda;
  result.tensor = empty_tensor(name, dtype_from_dlpack(name, t.dtype), t.ndim);
  result.tensor.data = t.data ? static_cast<char*>(t.data) + t.byte_offset : nullptr;
  int64_t row_major = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    result.tensor.shape[i] = t.shape[i];
    result.tensor.stride[i] = t.strides ? t.strides[i] : row_major;
    row_major *= t.shape[i];
  }
  settle_strides(&result.tensor);
  return result;
}

Array from_object(const char* name, const FaArray& given) {
  dlpack::DLTensor tensor{};
  if (given.api->tensor_from_object(given.object, &tensor) != 0) refuse(name, "can't be read");
  const int32_t device = tensor.device.device_type;
  if (device != dlpack::kCpu && device != dlpack::kCudaHost && device != dlpack::kCuda && device != dlpack::kCudaManaged)
    refuse(name, "is neither in the CPU's nor in a CUDA device's memory (DLPack device " + std::to_string(device) + ")");
  return from_dlpack(name, tensor);
}

Array from_numpy(const char* name, const char* dtype, const FaNumpyArray& array) {
  constexpr int kNotSwapped = 0x200, kWriteable = 0x400;
  Array result;
  result.read_only = !(array.flags & kWriteable);
  result.tensor = empty_tensor(name, dtype_by_name(name, dtype), array.rank);
  if (!(array.flags & kNotSwapped)) refuse(name, "has another byte order than this machine");
  result.tensor.data = array.data;
  for (int i = 0; i < array.rank; ++i) {
    result.tensor.shape[i] = array.shape[i];
    if (array.strides[i] % array.item_size != 0) refuse(name, "has strides that are no multiple of its elements' size");
    result.tensor.stride[i] = array.strides[i] / array.item_size;
  }
  settle_strides(&result.tensor);
  return result;
}

Array from_spec(const char* name, const FaArray& spec) {
  Array result;
  result.is_spec = true;
  const DType dtype = dtype_by_name(name, spec.dtype);
  empty_tensor(name, dtype, spec.rank);
  result.tensor = contiguous(nullptr, dtype, spec.shape, static_cast<size_t>(spec.rank));
  return result;
}

}  // namespace

void check(const Status& status) {
  if (!status.ok()) throw Error(status.code == StatusCode::kInvalidArgument ? kFaValueError : kFaRuntimeError, status.sentence);
}

Array array_from(const char* name, const FaArray& given) {
  if (given.object) return from_object(name, given);
  if (given.dlpack) return from_dlpack(name, given.dlpack->dl_tensor);
  if (given.numpy) return from_numpy(name, given.dtype, *given.numpy);
  if (!given.dtype) refuse(name, "is missing");
  return from_spec(name, given);
}

}  // namespace fa::plugin
