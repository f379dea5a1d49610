// SPDX-License-Identifier: Apache-2.0
// See tensor_map.h.
#include "kernels/common/tensor_map.h"

#include <cuda_runtime_api.h>

#include "dispatch.h"

namespace fa {
namespace {

constexpr int64_t kStrideUnit = 16;                 // bytes: the engine wants strides that are multiples of this …
constexpr int64_t kStrideLimit = int64_t{1} << 40;  // bytes: … and below this
constexpr int64_t kSizeLimit = int64_t{1} << 31;    // row numbers are 32-bit

using EncodeFunction = decltype(&cuTensorMapEncodeTiled);

EncodeFunction find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeFunction>(function) : nullptr;
}

bool is_addressable(const TensorView& tensor, std::string* why_not) {
  FA_REFUSE_IF(reinterpret_cast<uintptr_t>(tensor.data) % 16 != 0, "does not begin at a multiple of 16 bytes");
  for (int axis = 0; axis < 3; ++axis) {
    FA_REFUSE_IF(tensor.shape[axis] >= kSizeLimit, "has an axis of 2^31 elements or more");
    if (tensor.shape[axis] <= 1) continue;
    const int64_t stride = tensor.stride[axis], size = size_of(tensor.dtype);
    FA_REFUSE_IF(stride <= 0 || stride >= kStrideLimit / size || stride * size % kStrideUnit != 0,
                 "has stride " + std::to_string(stride) + " on axis " + std::to_string(axis) +
                     ", which is not a positive multiple of " + std::to_string(kStrideUnit / size));
  }
  return true;
}

}  // namespace

bool has_tensor_map(const TensorView& tensor) { return is_addressable(tensor, nullptr); }

std::string tensor_map_obstacle(const TensorView& tensor) {
  std::string sentence;
  is_addressable(tensor, &sentence);
  return sentence;
}

Status encode_tensor_map(const TensorView& tensor, int box_rows, CUtensorMap* map) {
  static const EncodeFunction encode = find_encoder();
  if (encode == nullptr)
    return {StatusCode::kCudaError, "The CUDA driver has no cuTensorMapEncodeTiled (it is older than 12.0)."};
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(tensor.shape[3]), static_cast<cuuint64_t>(tensor.shape[2]),
                               static_cast<cuuint64_t>(tensor.shape[1]), static_cast<cuuint64_t>(tensor.shape[0])};
  const int64_t size = size_of(tensor.dtype);
  cuuint64_t stride_bytes[3];  // of rows, heads, batches
  for (int i = 0; i < 3; ++i) {
    const int axis = 2 - i;
    stride_bytes[i] = tensor.shape[axis] > 1 ? tensor.stride[axis] * size : kStrideUnit;
  }
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(128 / size), static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  const CUtensorMapDataType type = tensor.dtype == DType::kFloat32      ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : tensor.dtype == DType::kFloat16    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                   : tensor.dtype == DType::kFloat8E4M3 ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                                                        : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result =
      encode(map, type, 4, tensor.data, sizes, stride_bytes, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return {};
  return {StatusCode::kCudaError,
          "cuTensorMapEncodeTiled failed with CUresult " + std::to_string(static_cast<int>(result)) + "."};
}

}  // namespace fa
