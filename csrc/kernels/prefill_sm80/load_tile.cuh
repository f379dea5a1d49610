// SPDX-License-Identifier: Apache-2.0
// Brings a tile of rows from global into shared memory: cp.async where the rows are 16-byte aligned and whole chunks long,
// element by element elsewhere. Rows and columns beyond the valid ones become 0. Called by the sm_80 kernels' whole thread block.
#pragma once

#include "kernels/common/cp_async.cuh"
#include "kernels/common/swizzle.cuh"

namespace fa::prefill_sm80 {

/// Which 16-byte chunks of a tile a thread copies: one column of chunks in each block, kRowsPerPass rows apart.
template <class T, class Layout, int kRows, int kThreads>
struct TileCopy {
  static constexpr int kPerBlock = Layout::kChunksPerBlock, kBlocks = Layout::kBytes / (kRows * Layout::kBlockBytes);
  static constexpr int kRowsPerPass = kThreads / kPerBlock, kPasses = (kRows + kRowsPerPass - 1) / kRowsPerPass;
  static constexpr int kPerChunk = 16 / sizeof(T), kBlockElements = kPerBlock * kPerChunk;
  static_assert(kRows % kRowsPerPass == 0 || kPasses == 1);

  static __device__ __forceinline__ int row() { return threadIdx.x / kPerBlock; }
  static __device__ __forceinline__ int column() { return threadIdx.x % kPerBlock * kPerChunk; }
  /// This thread's place in a tile at shared address 0.
  static __device__ __forceinline__ uint32_t place() { return Layout::offset(row(), threadIdx.x % kPerBlock); }

  /// Copies one pass of this thread from `data`, its first chunk there, to `place`. Rows from valid_rows and columns from
  /// head_dim on become 0.
  static __device__ __forceinline__ void copy(uint32_t place, const T* data, int pass, int valid_rows, int head_dim) {
    if (kRows < kRowsPerPass && row() >= kRows) return;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const bool valid = row() < valid_rows - pass * kRowsPerPass && column() < head_dim - block * kBlockElements;
      cp_async_16(Layout::advance(place, pass * kRowsPerPass, block * kPerBlock), data + block * kBlockElements, valid);
    }
  }

  /// Calls work(address) for each chunk of this thread, `place` being that of its first one.
  template <class Work>
  static __device__ __forceinline__ void for_chunks(uint32_t place, const Work& work) {
    if (kRows < kRowsPerPass && row() >= kRows) return;
#pragma unroll
    for (int i = 0; i < kPasses * kBlocks; ++i) work(Layout::advance(place, i / kBlocks * kRowsPerPass, i % kBlocks * kPerBlock));
  }
};

/// The whole tile element by element; row_data(row) is the address of a row's first element.
template <class T, class Layout, int kRows, int kThreads, class RowData>
__device__ __forceinline__ void load_tile_by_element(unsigned char* shared, int valid_rows, int head_dim, RowData row_data) {
  constexpr int kColumns = Layout::kBytes / kRows / static_cast<int>(sizeof(T)), kPerChunk = 16 / sizeof(T);
#pragma unroll 1
  for (int idx = threadIdx.x; idx < kRows * kColumns; idx += kThreads) {
    const int row = idx / kColumns, column = idx % kColumns;
    T element = T(0.0f);
    if (row < valid_rows && column < head_dim) element = row_data(row)[column];
    reinterpret_cast<T*>(shared + Layout::offset(row, column / kPerChunk))[column % kPerChunk] = element;
  }
}

/// The same for rows `row_stride` apart. Out of line, since the main loop has no registers and no instruction cache for it.
template <class T, class Layout, int kRows, int kThreads>
__device__ __noinline__ void load_strided_by_element(unsigned char* shared, int valid_rows, int head_dim, const T* data,
                                                     int64_t row_stride) {
  load_tile_by_element<T, Layout, kRows, kThreads>(shared, valid_rows, head_dim,
                                                   [&](int row) { return data + row * row_stride; });
}

}  // namespace fa::prefill_sm80
