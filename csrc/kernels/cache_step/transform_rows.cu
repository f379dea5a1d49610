// SPDX-License-Identifier: Apache-2.0
// The kernel of transform_rows.h: a lane has eight columns of a row, of a rotated one four and those that they are paired with.
// One instance for all element types, whose loads differ in a branch that all threads take.
#include "kernels/cache_step/transform_rows.h"
#include "kernels/common/convert.cuh"
#include "kernels/common/launch.h"
#include "kernels/common/launch_early.h"
#include "semantics/transform.h"

namespace fa::cache_step {
namespace {

constexpr int kRowsThreads = 256;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Four {
  float x[4];
};

/// Four neighbouring elements, the first at a multiple of four of an aligned row.
__device__ __forceinline__ Four load_4(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::kFloat32) {
    const float4 four = *reinterpret_cast<const float4*>(static_cast<const float*>(data) + index);
    return {four.x, four.y, four.z, four.w};
  }
  const uint2 bits = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(data) + index);
  const float2 low = unpack2(bits.x, dtype == DType::kFloat16), high = unpack2(bits.y, dtype == DType::kFloat16);
  return {low.x, low.y, high.x, high.y};
}

__device__ __forceinline__ void store_4(void* data, DType dtype, int64_t index, const Four& four) {
  const auto [a, b, c, d] = four.x;
  if (dtype == DType::kFloat32) {
    *reinterpret_cast<float4*>(static_cast<float*>(data) + index) = make_float4(a, b, c, d);
  } else {
    const uint2 bits = dtype == DType::kFloat16 ? make_uint2(pack2<__half>(a, b), pack2<__half>(c, d))
                                                : make_uint2(pack2<__nv_bfloat16>(a, b), pack2<__nv_bfloat16>(c, d));
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(data) + index) = bits;
  }
}

/// Four pairs: (low, high) where they are paired by halves, else the neighbours in both.
__device__ __forceinline__ void rotate(Four& low, Four& high, const Four& cos, const Four& sin, bool interleaved) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float& first = interleaved ? (i < 2 ? low.x[2 * i] : high.x[2 * i - 4]) : low.x[i];
    float& second = interleaved ? (i < 2 ? low.x[2 * i + 1] : high.x[2 * i - 3]) : high.x[i];
    const float own = first;
    first = rotated_first(own, second, cos.x[i], sin.x[i]);
    second = rotated_second(own, second, cos.x[i], sin.x[i]);
  }
}

/// By all lanes of a row: its columns over their root mean square, times their weights.
__device__ __forceinline__ void normalise(Four& low, Four& high, const RowsSide& side, unsigned first, unsigned second,
                                          bool has_columns, unsigned lanes) {
  float squares = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) squares += low.x[i] * low.x[i] + high.x[i] * high.x[i];
  for (unsigned other = lanes / 2; other > 0; other /= 2) squares += __shfl_xor_sync(kAllLanes, squares, other);
  if (!has_columns || !side.weight.present) return;
  const float factor = norm_factor(squares / static_cast<float>(8 * side.groups), side.epsilon);
  const Four weights[2] = {load_4(side.weight.data, side.weight.dtype, first),
                           load_4(side.weight.data, side.weight.dtype, second)};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    low.x[i] *= factor * weights[0].x[i];
    high.x[i] *= factor * weights[1].x[i];
  }
}

__global__ void __launch_bounds__(kRowsThreads) rows_kernel(const __grid_constant__ RowsArgs args) {
#if __CUDA_ARCH__ >= 900
  wait_for_earlier_kernels();
  let_next_kernel_start();
#endif
  // 1. Which row is these lanes', and which columns are this lane's.
  const unsigned lanes = 1u << args.log2_lanes, g = threadIdx.x % lanes;
  const unsigned own = (blockIdx.x * kRowsThreads + threadIdx.x) >> args.log2_lanes, idx = min(own, args.count - 1);
  const unsigned any_row = args.heads.quotient(idx), any_head = idx - any_row * args.heads.divisor;
  const unsigned batch_idx = args.rows.quotient(any_row), row = any_row - batch_idx * args.rows.divisor;
  const int which = any_head < args.first_head[1] ? 0 : any_head < args.first_head[2] ? 1 : 2;
  const RowsSide& side = args.sides[which];
  const int64_t head = any_head - args.first_head[which];
  const bool has_columns = own < args.count && g < side.groups, is_rotated = g < side.rotated_groups;
  const bool by_halves = is_rotated && !args.rotary.interleaved;
  const unsigned first = by_halves ? 4 * g : 8 * g, second = by_halves ? 4 * (side.rotated_groups + g) : 8 * g + 4;
  // 2. The row.
  const int64_t source = batch_idx * side.from_batch + head * side.from_head + row * side.from_row;
  Four low{}, high{};
  if (has_columns) low = load_4(side.from, args.dtype, source + first), high = load_4(side.from, args.dtype, source + second);
  // 3. What becomes of it.
  if (args.has_norm) normalise(low, high, side, first, second, has_columns, lanes);
  if (!has_columns) return;
  if (is_rotated) {
    int64_t position = row;
    if (!args.rotary.by_row && !args.rotary.position_ids.present) {
      const CacheStep step = args.rule.at(batch_idx);
      position = which == 0 ? position_of_query(step, row) : position_of_new_row(args.rule, step, row);
    }
    const TensorView &cos = args.rotary.cos, &sin = args.rotary.sin;
    rotate(low, high, load_4(cos.data, cos.dtype, angles_of(args.rotary, cos, batch_idx, row, position) + 4 * g),
           load_4(sin.data, sin.dtype, angles_of(args.rotary, sin, batch_idx, row, position) + 4 * g), args.rotary.interleaved);
  }
  const int64_t target = batch_idx * side.to_batch + head * side.to_head + row * side.to_row;
  store_4(side.to, args.dtype, target + first, low);
  store_4(side.to, args.dtype, target + second, high);
}

}  // namespace

cudaError_t launch_rows(const RowsArgs& args, bool early, cudaStream_t stream) {
  const unsigned rows_of_block = kRowsThreads >> args.log2_lanes, blocks = (args.count + rows_of_block - 1) / rows_of_block;
  if (early) return launch_early(rows_kernel, static_cast<int>(blocks), kRowsThreads, 0, stream, args);
  return launch_kernel(rows_kernel, dim3(blocks), kRowsThreads, 0, stream, args);
}

}  // namespace fa::cache_step
