// SPDX-License-Identifier: Apache-2.0
// See tensor_map.h.
#include "kernels/common/tensor_map.h"

#include <cuda_runtime_api.h>

#include "dispatch.h"
#include "kernels/common/driver.h"

namespace fa {
namespace {

constexpr int64_t kStrideUnit = 16;                 // bytes: the engine wants strides that are multiples of this …
constexpr int64_t kStrideLimit = int64_t{1} << 40;  // bytes: … and below this
constexpr int64_t kPanelBytes = 128;                // of a row: the widest that the swizzle takes
constexpr int64_t kSizeLimit = int64_t{1} << 31;    // row numbers are 32-bit

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

cuuint64_t stride_bytes(const TensorView& tensor, int axis) {
  return tensor.shape[axis] > 1 ? tensor.stride[axis] * size_of(tensor.dtype) : kStrideUnit;
}

cuuint32_t panel_columns(const TensorView& tensor) { return static_cast<cuuint32_t>(kPanelBytes / size_of(tensor.dtype)); }

CUtensorMapDataType type_in_map(DType dtype) {
  if (dtype == DType::kFloat32) return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  if (size_of(dtype) == 1) return CU_TENSOR_MAP_DATA_TYPE_UINT8;
  return dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

/// A thread that hasn't used CUDA's runtime yet (autograd's, for one) has no context, which the driver's functions want.
bool make_context_current() {
  int ordinal = 0;
  return cudaGetDevice(&ordinal) == cudaSuccess && cudaSetDevice(ordinal) == cudaSuccess;
}

/// Axes from the fastest on; stride_bytes are those of all but the first.
template <int kAxes>
Status encode(const TensorView& tensor, const cuuint64_t (&sizes)[kAxes], const cuuint64_t (&stride_bytes)[kAxes - 1],
              const cuuint32_t (&box)[kAxes], L2Fetch fetch, CUtensorMap* map) {
  static const auto encoder = find_in_driver<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  if (encoder == nullptr)
    return {StatusCode::kCudaError, "The CUDA driver has no cuTensorMapEncodeTiled (it is older than 12.0)."};
  cuuint32_t element_strides[kAxes];
  for (cuuint32_t& stride : element_strides) stride = 1;
  const auto promotion = fetch == L2Fetch::kLine ? CU_TENSOR_MAP_L2_PROMOTION_L2_128B : CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
  const auto call = [&] {
    return encoder(map, type_in_map(tensor.dtype), kAxes, tensor.data, sizes, stride_bytes, box, element_strides,
                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = call();
  if (result == CUDA_ERROR_INVALID_CONTEXT && make_context_current()) result = call();
  if (result == CUDA_SUCCESS) return {};
  return {StatusCode::kCudaError,
          "cuTensorMapEncodeTiled failed with CUresult " + std::to_string(static_cast<int>(result)) + "."};
}

}  // namespace

bool has_tensor_map(const TensorView& tensor) { return is_addressable(tensor, nullptr); }

std::string tensor_map_obstacle(const TensorView& tensor) {
  std::string sentence;
  is_addressable(tensor, &sentence);
  return sentence;
}

Status encode_tensor_map(const TensorView& tensor, int box_rows, CUtensorMap* map, L2Fetch fetch) {
  const auto columns = static_cast<cuuint64_t>(tensor.shape[3]), rows = static_cast<cuuint64_t>(tensor.shape[2]);
  const auto heads = static_cast<cuuint64_t>(tensor.shape[1]), batch = static_cast<cuuint64_t>(tensor.shape[0]);
  return encode<4>(tensor, {columns, rows, heads, batch},
                   {stride_bytes(tensor, 2), stride_bytes(tensor, 1), stride_bytes(tensor, 0)},
                   {panel_columns(tensor), static_cast<cuuint32_t>(box_rows), 1, 1}, fetch, map);
}

Status encode_panels_map(const TensorView& tensor, int box_rows, int panels, CUtensorMap* map) {
  const cuuint32_t width = panel_columns(tensor);
  const cuuint64_t rows = static_cast<cuuint64_t>(tensor.shape[2]), all_panels = static_cast<cuuint64_t>(tensor.shape[3]) / width;
  const auto heads = static_cast<cuuint64_t>(tensor.shape[1]), batch = static_cast<cuuint64_t>(tensor.shape[0]);
  return encode<5>(tensor, {width, rows, all_panels, heads, batch},
                   {stride_bytes(tensor, 2), kPanelBytes, stride_bytes(tensor, 1), stride_bytes(tensor, 0)},
                   {width, static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(panels), 1, 1}, L2Fetch::kLine, map);
}

}  // namespace fa
