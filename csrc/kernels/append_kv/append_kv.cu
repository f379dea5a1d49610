// SPDX-License-Identifier: Apache-2.0
// The CUDA part of fa::append_kv: past and fresh rows into present, any strides, one block-stride pass. Shapes are checked by the
// caller.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "append_kv.h"
#include "kernels/common/launch.h"

namespace fa {
namespace {

/// Element is what moves at once: one element, or 16 bytes of a row; `view` strides and `columns` count them.
template <class Element>
__global__ void append_kernel(const __grid_constant__ TensorView past, const __grid_constant__ TensorView fresh,
                              const __grid_constant__ TensorView present, int64_t columns, int64_t per_element, int64_t count) {
  for (int64_t idx = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; idx < count; idx += int64_t{gridDim.x} * blockDim.x) {
    const int64_t column = idx % columns, row = idx / columns % present.shape[2], pair = idx / columns / present.shape[2];
    const int64_t head = pair % present.shape[1], b = pair / present.shape[1];
    const bool is_past = row < past.shape[2];
    const TensorView& from = is_past ? past : fresh;
    const int64_t from_row = is_past ? row : row - past.shape[2];
    const auto offset = [&](const TensorView& view, int64_t r) {
      return (b * view.stride[0] + head * view.stride[1] + r * view.stride[2]) / per_element +
             column * (per_element > 1 ? 1 : view.stride[3]);
    };
    static_cast<Element*>(present.data)[offset(present, row)] = static_cast<const Element*>(from.data)[offset(from, from_row)];
  }
}

bool aligned_to(const TensorView& view, int64_t elements) {
  bool aligned = reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && (view.shape[3] == 1 || view.stride[3] == 1);
  for (int axis = 0; axis < 3; ++axis) aligned = aligned && (view.shape[axis] == 1 || view.stride[axis] % elements == 0);
  return aligned && view.shape[3] % elements == 0;
}

}  // namespace

Status append_kv_cuda(const TensorView& past, const TensorView& fresh, const TensorView& present, const Device& device,
                      const ExecutionContext& context) {
  const int64_t size = size_of(present.dtype), wide = 16 / size;
  const bool by_chunk = aligned_to(past, wide) && aligned_to(fresh, wide) && aligned_to(present, wide);
  const int64_t per_element = by_chunk ? wide : 1, columns = present.shape[3] / per_element;
  const int64_t count = present.shape[0] * present.shape[1] * present.shape[2] * columns;
  if (count == 0) return {};
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((count + 255) / 256, int64_t{64} * std::max(1, device.num_sms)));
  const auto kernel = by_chunk ? append_kernel<uint4> : size == 4 ? append_kernel<uint32_t> : append_kernel<uint16_t>;
  const cudaError_t error = launch_kernel(kernel, dim3(blocks), 256, 0, static_cast<cudaStream_t>(context.stream), past, fresh,
                                          present, columns, per_element, count);
  return cuda_status(error, "append_kv could not be launched");
}

}  // namespace fa
