// SPDX-License-Identifier: Apache-2.0
// From an accumulator of wgmma to rows of device memory, 16 bytes a thread, without shared memory: the four lanes that hold a row
// exchange their parts of four neighbouring groups of eight columns.
#pragma once

#include "kernels/backward_sm90/query_sums.cuh"
#include "kernels/backward_sm90/shared_plan.cuh"
#include "kernels/common/convert.cuh"
#include "kernels/common/reduce.cuh"

namespace fa::backward_sm90 {

/// Lane t of a quad gives parts[u], its pair of columns of group u, and gets group t's four pairs, in their order.
__device__ __forceinline__ uint4 exchange_in_quad(const uint32_t (&parts)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  const uint32_t low = __shfl_xor_sync(kAllLanes, odd ? parts[0] : parts[1], 1);
  const uint32_t low_pair[2] = {odd ? low : parts[0], odd ? parts[1] : low};
  const uint32_t upper = __shfl_xor_sync(kAllLanes, odd ? parts[2] : parts[3], 1);
  const uint32_t upper_pair[2] = {odd ? upper : parts[2], odd ? parts[3] : upper};
  const uint32_t x = __shfl_xor_sync(kAllLanes, high ? low_pair[0] : upper_pair[0], 2);
  const uint32_t y = __shfl_xor_sync(kAllLanes, high ? low_pair[1] : upper_pair[1], 2);
  return high ? make_uint4(x, y, upper_pair[0], upper_pair[1]) : make_uint4(low_pair[0], low_pair[1], x, y);
}

/// An 8x8 matrix of 16-bit elements, of which lane l has elements 2 (l % 4) and the next of row l / 4, transposed.
__device__ __forceinline__ uint32_t transposed_matrix(uint32_t pair) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
  return out;
}

/// Writes factor * x, of which the thread has parts of the two rows `row` and `row` + 8, as far as there are rows and columns.
/// `first`: row 0's first element.
template <class T, int kCount>
__device__ __forceinline__ void store_fragment(const float (&x)[kCount], float factor, T* first, int64_t row_stride, int row,
                                               int num_rows, int num_columns) {
  static_assert(kCount % 16 == 0, "Groups of eight columns are stored four at a time.");
#pragma unroll
  for (int i = 0; i < kCount / 16; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t parts[4];
#pragma unroll
      for (int u = 0; u < 4; ++u) parts[u] = pack2<T>(x[16 * i + 4 * u + 2 * r] * factor, x[16 * i + 4 * u + 2 * r + 1] * factor);
      const uint4 group = exchange_in_quad(parts);
      const int column = 32 * i + threadIdx.x % 4 * 8;
      if (row + 8 * r < num_rows && column < num_columns)
        *reinterpret_cast<uint4*>(first + (row + 8 * r) * row_stride + column) = group;
    }
  }
}

/// Likewise of a transposed accumulator, whose rows are 64 neighbouring columns of the tensor and whose columns are rows of it,
/// `row` the first.
template <class T, int kCount>
__device__ __forceinline__ void store_transposed_fragment(const float (&x)[kCount], float factor, T* first, int64_t row_stride,
                                                          int row, int num_rows, int num_columns) {
  static_assert(kCount % 8 == 0, "Sixteen rows are stored at a time.");
  const int t = threadIdx.x % 4, in_group = threadIdx.x % 32 / 4;
  const int column = threadIdx.x / 32 % 4 * 16 + t % 2 * 8;
#pragma unroll
  for (int i = 0; i < kCount / 8; ++i) {
    uint32_t parts[4];  // rows 16 i … + 7 of the warp's columns 0 … 7 and 8 … 15, then rows 16 i + 8 … + 15
#pragma unroll
    for (int u = 0; u < 4; ++u) parts[u] = transposed_matrix(pack2<T>(x[8 * i + 2 * u] * factor, x[8 * i + 2 * u + 1] * factor));
    const uint4 group = exchange_in_quad(parts);
    const int to = row + 16 * i + 8 * (t / 2) + in_group;
    if (to < num_rows && column < num_columns) *reinterpret_cast<uint4*>(first + to * row_stride + column) = group;
  }
}

/// A warpgroup's part of a tile of d_query, whose rows begin at `first_row` of the item's sequence.
template <class C, int kCount>
__device__ __forceinline__ void store_query_rows(const float (&dq)[kCount], const KernelArgs& args, const Item& item, int head,
                                                 int first_row, int warpgroup) {
  using T = typename C::T;
  const TensorView& out = args.d_query;
  constexpr bool kByColumns = C::kPanels == 2;
  const int column = kByColumns ? warpgroup * 64 : 0;
  T* first = static_cast<T*>(out.data) + item.batch * out.stride[0] + head * out.stride[1] + column;
  if constexpr (C::kPacked) first += item.first_row * out.stride[2];
  const int num_rows = C::kPacked ? item.view.query_length : static_cast<int>(out.shape[2]);
  const int num_columns = static_cast<int>(out.shape[3]) - column;
  if constexpr (C::kTransposed) {
    store_transposed_fragment(dq, args.scale, first, out.stride[2], first_row, num_rows, num_columns);
  } else {
    const int row = first_row + (kByColumns ? 0 : warpgroup * 64) + first_row_of_thread();
    store_fragment(dq, args.scale, first, out.stride[2], row, num_rows, num_columns);
  }
}

/// A warpgroup's d_key or d_value, times a factor; its keys begin at `first_key` of the item's sequence.
template <class C, int kCount>
__device__ __forceinline__ void store_key_rows(const float (&x)[kCount], float factor, const TensorView& out, const Item& item,
                                               int first_key) {
  using T = typename C::T;
  T* first = static_cast<T*>(out.data) + item.batch * out.stride[0] + item.key_head * out.stride[1];
  if constexpr (C::kPacked) first += item.first_key * out.stride[2];
  store_fragment(x, factor, first, out.stride[2], first_key + first_row_of_thread(),
                 C::kPacked ? item.num_keys : static_cast<int>(out.shape[2]), static_cast<int>(out.shape[3]));
}

}  // namespace fa::backward_sm90
