// SPDX-License-Identifier: Apache-2.0
// From a warp's unnormalized rows to memory: the sink, rows without keys, log-sum-exp, and the output through shared memory so
// that it is written in whole 16-byte chunks. Called once by each warp of the sm_80 kernels; its rows of the query tile serve as
// the buffer.
#pragma once

#include "kernels/common/convert.cuh"
#include "kernels/common/hidden_values.cuh"
#include "kernels/common/shared_memory.cuh"
#include "kernels/prefill_sm80/softmax.cuh"
#include "kernels/prefill_sm80/tile_work.cuh"

namespace fa::prefill_sm80 {

template <class T>
__device__ __forceinline__ T* row_data(const TensorView& view, int64_t b, int64_t h, int64_t row) {
  return static_cast<T*>(view.data) + b * view.stride[0] + h * view.stride[1] + row * view.stride[2];
}

__device__ __forceinline__ int64_t partial_index(const AttentionParams& p, const TileWork& work, const TileRow& row, int split) {
  return ((split * p.query.shape[0] + work.sequence.batch_idx) * p.query.shape[1] + row.head) * p.query.shape[2] + row.row;
}

/// Normalizes this lane's rows and writes their lse. A row that attends no key becomes 0. True: one of the warp's may be
/// NaN, though its weights are numbers.
template <class Config>
__device__ __forceinline__ bool normalize_rows(typename Config::Products::Out& out, const RowState<Config::kRowBlocks>& state,
                                               const AttentionParams& p, const TileGrid& grid, const TileWork& work, int warp_row,
                                               int split) {
  const int g = (threadIdx.x % 32) / 4, t = threadIdx.x % 4;
  bool spoilt = false;
#pragma unroll
  for (int m = 0; m < Config::kRowBlocks; ++m) {
    float sum[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const TileRow row = tile_row<Config::kSplit>(work, grid, warp_row + 16 * m + g + 8 * r);
      const float reference = state.reference[m][r];
      SoftmaxState all{Config::kNatural || reference == -INFINITY ? reference : reference * p.softmax_scale,
                       quad_sum(state.sum[m][r])};
      const bool has_keys = row.in_use && all.sum != 0.0f;
      float factor = normalizer(all);
      if (p.sinks.present && row.in_use && grid.partial_out == nullptr) {
        const float top = all.max;
        all = add_sink(all, static_cast<const float*>(p.sinks.data)[row.head * p.sinks.stride[0]]);
        factor = rescale_factor(top, all.max) * normalizer(all);
      }
#pragma unroll
      for (int d = 0; d < Config::Products::kDimBlocks; ++d) out[m][d][2 * r] *= factor, out[m][d][2 * r + 1] *= factor;
      sum[r] = all.sum;
      if (!has_keys) {
#pragma unroll
        for (int d = 0; d < Config::Products::kDimBlocks; ++d) out[m][d][2 * r] = out[m][d][2 * r + 1] = 0.0f;
      }
      if (t != 0 || !row.exists || Config::column_group() != 0) continue;
      if (Config::kSplit && grid.partial_out != nullptr) {
        grid.partial_state[partial_index(p, work, row, split)] = make_float2(all.max, all.sum);
      } else if (p.lse.present) {
        *row_data<float>(p.lse, work.sequence.batch_idx, row.head, work.sequence.first_row + row.row) =
            row.in_use ? lse(all) : -INFINITY;
      }
    }
    constexpr int kCount = 4 * Config::Products::kDimBlocks;
    if (grid.may_spoil_rows) spoilt |= has_spoilt_row(reinterpret_cast<const float (&)[kCount]>(out[m]), sum);
  }
  return __any_sync(kAllLanes, spoilt);
}

/// Mends those of the warp's rows that hold values of hidden keys. All of them have been written.
template <class Config>
__device__ __forceinline__ void mend_rows(const AttentionParams& p, const TileGrid& grid, const TileWork& work, int warp_row) {
  const int first_column = Config::column_group() * Config::kColumns;
  const int end_column = min(first_column + Config::kColumns, static_cast<int>(p.value.shape[3]));
  __syncwarp();
#pragma unroll 1
  for (int i = 0; i < 16 * Config::kRowBlocks; ++i) {
    const TileRow row = tile_row<Config::kSplit>(work, grid, warp_row + i);
    if (row.in_use) {
      mend_row<typename Config::T>(p, grid.sequences, work.sequence_idx, row.head, row.row, first_column, end_column);
    }
  }
}

/// float32 partial output of one split.
template <class Config>
__device__ __forceinline__ void write_partial(const typename Config::Products::Out& out, const AttentionParams& p,
                                              const TileGrid& grid, const TileWork& work, int warp_row, int split) {
  const int g = (threadIdx.x % 32) / 4, t = threadIdx.x % 4;
  const int64_t head_dim_v = p.value.shape[3];
#pragma unroll
  for (int m = 0; m < Config::kRowBlocks; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const TileRow row = tile_row<Config::kSplit>(work, grid, warp_row + 16 * m + g + 8 * r);
      if (!row.exists) continue;
      float* data = grid.partial_out + partial_index(p, work, row, split) * head_dim_v;
#pragma unroll
      for (int d = 0; d < Config::Products::kDimBlocks; ++d) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = 8 * d + 2 * t + e;
          if (column < head_dim_v) data[column] = out[m][d][2 * r + e];
        }
      }
    }
  }
}

/// The warp's rows, in the element type, into its part of the tile in shared memory.
template <class Config>
__device__ __forceinline__ void stage_out(const typename Config::Products::Out& out, unsigned char* tile, int warp_row) {
  using T = typename Config::T;
  using Layout = typename Config::LayoutQ;
  const int g = (threadIdx.x % 32) / 4, t = threadIdx.x % 4;
  constexpr int kChunksPerBlock = 8 * sizeof(T) / 16;  // of a d-block
  const int first_chunk = Config::column_group() * (Config::kColumns * sizeof(T) / 16);
  const uint32_t place = static_cast<uint32_t>(__cvta_generic_to_shared(tile)) +
                         Layout::offset(warp_row + g, first_chunk + 2 * t * sizeof(T) / 16) + 2 * t * sizeof(T) % 16;
#pragma unroll
  for (int m = 0; m < Config::kRowBlocks; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int d = 0; d < Config::Products::kDimBlocks; ++d) {
        const uint32_t address = Layout::advance(place, 16 * m + 8 * r, kChunksPerBlock * d);
        if constexpr (sizeof(T) == 2) {
          store_shared(address, pack2<T>(out[m][d][2 * r], out[m][d][2 * r + 1]));
        } else {
          store_shared(address, out[m][d][2 * r], out[m][d][2 * r + 1]);
        }
      }
    }
  }
}

/// The warp's rows into its part of the tile, then to `out` in 16-byte chunks, or element by element where it isn't aligned.
template <class Config>
__device__ __forceinline__ void write_out(const typename Config::Products::Out& out, unsigned char* tile,
                                          const AttentionParams& p, const TileGrid& grid, const TileWork& work, int warp_row) {
  using T = typename Config::T;
  using Layout = typename Config::LayoutQ;
  constexpr int kPerChunk = 16 / sizeof(T), kPerBlock = Layout::kChunksPerBlock, kRowsPerPass = 32 / kPerBlock;
  constexpr int kBlocks = Config::kColumns / (kPerBlock * kPerChunk);  // of the warp's columns
  __syncwarp();
  stage_out<Config>(out, tile, warp_row);
  __syncwarp();
  const int chunk = Config::column_group() * kBlocks * kPerBlock + threadIdx.x % kPerBlock,
            first = warp_row + threadIdx.x % 32 / kPerBlock;
  const int head_dim_v = static_cast<int>(p.value.shape[3]);
  T* data = nullptr;
#pragma unroll
  for (int pass = 0; pass < 16 * Config::kRowBlocks / kRowsPerPass; ++pass) {
    const TileRow row = tile_row<Config::kSplit>(work, grid, first + pass * kRowsPerPass);
    if (Config::kSplit || pass == 0) {
      data = row_data<T>(p.out, work.sequence.batch_idx, row.head, work.sequence.first_row + row.row) + chunk * kPerChunk;
    } else {
      data += kRowsPerPass * p.out.stride[2];
    }
    if (!row.exists) break;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const unsigned char* source = tile + Layout::offset(first, chunk);
      source = tile + Layout::advance(static_cast<uint32_t>(source - tile), pass * kRowsPerPass, block * kPerBlock);
      const int columns = head_dim_v - (block * kPerBlock + chunk) * kPerChunk;
      if (grid.out_by_16) {
        if (columns > 0)
          *reinterpret_cast<uint4*>(data + block * kPerBlock * kPerChunk) = *reinterpret_cast<const uint4*>(source);
      } else {
#pragma unroll 1
        for (int i = 0; i < min(kPerChunk, columns); ++i)
          data[block * kPerBlock * kPerChunk + i] = reinterpret_cast<const T*>(source)[i];
      }
    }
  }
}

}  // namespace fa::prefill_sm80
