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
constexpr int kRowsOfLane = 4;  // whose loads are under way at once
constexpr unsigned kAllLanes = 0xffffffffu;

struct Four {
  float x[4];
};

/// Four elements as they are in memory, of which those of 16 bits fill two words.
struct FourBits {
  uint4 bits;
};

/// Begins to read four neighbouring elements, the first at a multiple of four of an aligned row.
__device__ __forceinline__ FourBits load_4(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::kFloat32) return {*reinterpret_cast<const uint4*>(static_cast<const uint32_t*>(data) + index)};
  const uint2 pairs = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(data) + index);
  return {make_uint4(pairs.x, pairs.y, 0, 0)};
}

__device__ __forceinline__ Four numbers_of(const FourBits& four, DType dtype) {
  const uint4& bits = four.bits;
  if (dtype == DType::kFloat32)
    return {__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z), __uint_as_float(bits.w)};
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

/// A lane's eight columns of a row, and the angles of their four pairs.
struct Columns {
  unsigned which, batch_idx, row;  // of the row: its tensor, batch entry and place
  int64_t head;
  bool is_there, is_rotated;
  unsigned first, second;  // where each four begin
  FourBits low, high, cos, sin;
};

/// Row `idx` of all; its lane g begins to read.
__device__ __forceinline__ void begin_row(const RowsArgs& args, unsigned idx, unsigned g, Columns& own) {
  const unsigned known = min(idx, args.count - 1), any_row = args.heads.quotient(known);
  const unsigned any_head = known - any_row * args.heads.divisor;
  own.batch_idx = args.rows.quotient(any_row);
  own.row = any_row - own.batch_idx * args.rows.divisor;
  own.which = any_head < args.first_head[1] ? 0 : any_head < args.first_head[2] ? 1 : 2;
  const RowsSide& side = args.sides[own.which];
  own.head = any_head - args.first_head[own.which];
  own.is_there = idx < args.count && g < side.groups;
  own.is_rotated = own.is_there && g < side.rotated_groups;
  const bool by_halves = own.is_rotated && !args.rotary.interleaved;
  own.first = by_halves ? 4 * g : 8 * g;
  own.second = by_halves ? 4 * (side.rotated_groups + g) : 8 * g + 4;
  own.low = own.high = {};
  if (!own.is_there) return;
  const int64_t source = own.batch_idx * side.from_batch + own.head * side.from_head + own.row * side.from_row;
  own.low = load_4(side.from, args.dtype, source + own.first);
  own.high = load_4(side.from, args.dtype, source + own.second);
}

/// Position in its sequence. Called from several places, and so not a copy for each.
__device__ __noinline__ int64_t position_of(const CacheRule& rule, unsigned batch_idx, unsigned row, bool is_query) {
  const CacheStep step = rule.at(batch_idx);
  return is_query ? position_of_query(step, row) : position_of_new_row(rule, step, row);
}

/// Likewise the angles.
__device__ __forceinline__ void begin_angles(const RowsArgs& args, unsigned g, Columns& own) {
  const RotaryParams& rotary = args.rotary;
  if (!own.is_rotated) return;
  const int64_t position = rotates_by_position(rotary) ? position_of(args.rule, own.batch_idx, own.row, own.which == 0) : 0;
  own.cos = load_4(rotary.cos.data, rotary.cos.dtype, angles_of(rotary, rotary.cos, own.batch_idx, own.row, position) + 4 * g);
  own.sin = load_4(rotary.sin.data, rotary.sin.dtype, angles_of(rotary, rotary.sin, own.batch_idx, own.row, position) + 4 * g);
}

/// By all lanes of a row: its columns over their root mean square, times their weights.
__device__ __forceinline__ void normalise(const Columns& own, const RowsSide& side, unsigned lanes, Four& low, Four& high) {
  float squares = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) squares += low.x[i] * low.x[i] + high.x[i] * high.x[i];
  for (unsigned other = lanes / 2; other > 0; other /= 2) squares += __shfl_xor_sync(kAllLanes, squares, other);
  if (!own.is_there || !side.weight.present) return;
  const float factor = norm_factor(squares / static_cast<float>(8 * side.groups), side.epsilon);
  const DType dtype = side.weight.dtype;
  const Four first = numbers_of(load_4(side.weight.data, dtype, own.first), dtype);
  const Four second = numbers_of(load_4(side.weight.data, dtype, own.second), dtype);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    low.x[i] *= factor * first.x[i];
    high.x[i] *= factor * second.x[i];
  }
}

/// Norm, rotation, and the way to where the row belongs.
__device__ __forceinline__ void end_row(const RowsArgs& args, unsigned lanes, const Columns& own) {
  const RowsSide& side = args.sides[own.which];
  Four low = numbers_of(own.low, args.dtype), high = numbers_of(own.high, args.dtype);
  if (args.has_norm) normalise(own, side, lanes, low, high);
  if (!own.is_there) return;
  const RotaryParams& rotary = args.rotary;
  if (own.is_rotated)
    rotate(low, high, numbers_of(own.cos, rotary.cos.dtype), numbers_of(own.sin, rotary.sin.dtype), rotary.interleaved);
  const int64_t target = own.batch_idx * side.to_batch + own.head * side.to_head + own.row * side.to_row;
  store_4(side.to, args.dtype, target + own.first, low);
  store_4(side.to, args.dtype, target + own.second, high);
}

__global__ void __launch_bounds__(kRowsThreads) rows_kernel(const __grid_constant__ RowsArgs args) {
#if __CUDA_ARCH__ >= 900
  wait_for_earlier_kernels();
  let_next_kernel_start();
#endif
  const unsigned lanes = 1u << args.log2_lanes, g = threadIdx.x % lanes;
  const unsigned first = ((blockIdx.x * kRowsThreads + threadIdx.x) >> args.log2_lanes) * kRowsOfLane;
  Columns own[kRowsOfLane];
#pragma unroll
  for (int i = 0; i < kRowsOfLane; ++i) begin_row(args, first + i, g, own[i]);
#pragma unroll
  for (int i = 0; i < kRowsOfLane; ++i) begin_angles(args, g, own[i]);
#pragma unroll
  for (int i = 0; i < kRowsOfLane; ++i) end_row(args, lanes, own[i]);
}

}  // namespace

cudaError_t launch_rows(const RowsArgs& args, bool early, cudaStream_t stream) {
  const unsigned rows_of_block = (kRowsThreads >> args.log2_lanes) * kRowsOfLane;
  const unsigned blocks = (args.count + rows_of_block - 1) / rows_of_block;
  if (early) return launch_early(rows_kernel, static_cast<int>(blocks), kRowsThreads, 0, stream, args);
  return launch_kernel(rows_kernel, dim3(blocks), kRowsThreads, 0, stream, args);
}

}  // namespace fa::cache_step
