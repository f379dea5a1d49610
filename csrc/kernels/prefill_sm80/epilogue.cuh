// SPDX-License-Identifier: Apache-2.0
// From a warp's unnormalized rows to memory: the sink, rows without keys, log-sum-exp, and the output through shared memory so
// that it is written in whole 16-byte chunks. Called once by each warp of the sm_80 kernels; its rows of the query tile serve as
// the buffer.
#pragma once

#include "kernels/common/convert.cuh"
#include "kernels/prefill_sm80/softmax.cuh"
#include "kernels/prefill_sm80/tile_work.cuh"

namespace fa {

template <class T>
__device__ __forceinline__ T* row_data(const TensorView& view, int64_t b, int64_t h, int64_t row) {
  return static_cast<T*>(view.data) + b * view.stride[0] + h * view.stride[1] + row * view.stride[2];
}

/// The mean of all values of a sequence's head, by all threads of the block, into shared memory.
template <class T, int kThreads>
__device__ __noinline__ void mean_of_values(float* mean, const T* value, int64_t num_keys, int64_t row_stride, int head_dim_v) {
  for (int d = threadIdx.x; d < head_dim_v; d += kThreads) {
    float sum = 0.0f;
    for (int64_t key = 0; key < num_keys; ++key) sum += to_float(value[key * row_stride + d]);
    mean[d] = num_keys > 0 ? sum / static_cast<float>(num_keys) : 0.0f;
  }
}

/// Normalizes this lane's rows and writes their lse. A row that attends no key keeps out = 0. True where a row in use is such a
/// row.
template <class Config>
__device__ __forceinline__ bool normalize_rows(typename Config::Products::Out& out, RowState<Config::kRowBlocks>& state,
                                               const AttentionParams& p, const TileGrid& grid, const TileWork& work, int warp_row,
                                               int split) {
  const int g = (threadIdx.x % 32) / 4, t = threadIdx.x % 4;
  bool any_empty = false;
#pragma unroll
  for (int m = 0; m < Config::kRowBlocks; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const TileRow row = tile_row<Config::kSplit>(work, grid, warp_row + 16 * m + g + 8 * r);
      const float reference = state.reference[m][r];
      SoftmaxState keys{Config::kNatural || reference == -INFINITY ? reference : reference * p.softmax_scale,
                        quad_sum(state.sum[m][r])};
      SoftmaxState all = keys;
      if (p.sinks.present && row.in_use && grid.partial_out == nullptr) {
        all = add_sink(keys, static_cast<const float*>(p.sinks.data)[row.head * p.sinks.stride[0]]);
      }
      const float factor = rescale_factor(keys.max, all.max) * normalizer(all);
      const bool has_keys = row.in_use && keys.sum != 0.0f;
      state.sum[m][r] = all.sum;
      any_empty |= row.in_use && all.sum == 0.0f;
#pragma unroll
      for (int d = 0; d < Config::Products::kDimBlocks; ++d) {
        out[m][d][2 * r] = has_keys ? out[m][d][2 * r] * factor : 0.0f;
        out[m][d][2 * r + 1] = has_keys ? out[m][d][2 * r + 1] * factor : 0.0f;
      }
      if (t != 0 || !row.exists) continue;
      if (grid.partial_out != nullptr) {
        const int64_t rows = p.query.shape[2], heads = p.query.shape[1];
        const int64_t idx = ((split * p.query.shape[0] + work.sequence.batch_idx) * heads + row.head) * rows + row.row;
        grid.partial_lse[idx] = lse(all);
      } else if (p.lse.present) {
        *row_data<float>(p.lse, work.sequence.batch_idx, row.head, work.sequence.first_row + row.row) =
            row.in_use ? lse(all) : -INFINITY;
      }
    }
  }
  return any_empty;
}

/// Puts the mean of the values into rows in use without keys.
template <class Config>
__device__ __forceinline__ void fill_empty_rows(typename Config::Products::Out& out, const RowState<Config::kRowBlocks>& state,
                                                const TileGrid& grid, const TileWork& work, const float* mean, int warp_row,
                                                int head_dim_v) {
  const int g = (threadIdx.x % 32) / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < Config::kRowBlocks; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const TileRow row = tile_row<Config::kSplit>(work, grid, warp_row + 16 * m + g + 8 * r);
      if (!row.in_use || state.sum[m][r] != 0.0f) continue;
#pragma unroll
      for (int d = 0; d < Config::Products::kDimBlocks; ++d) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = 8 * d + 2 * t + e;
          if (column < head_dim_v) out[m][d][2 * r + e] = mean[column];
        }
      }
    }
  }
}

/// float32 partial output of one split.
template <class Config>
__device__ __forceinline__ void write_partial(const typename Config::Products::Out& out, const AttentionParams& p,
                                              const TileGrid& grid, const TileWork& work, int warp_row, int split) {
  const int g = (threadIdx.x % 32) / 4, t = threadIdx.x % 4;
  const int64_t rows = p.query.shape[2], heads = p.query.shape[1], head_dim_v = p.value.shape[3];
#pragma unroll
  for (int m = 0; m < Config::kRowBlocks; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const TileRow row = tile_row<Config::kSplit>(work, grid, warp_row + 16 * m + g + 8 * r);
      if (!row.exists) continue;
      const int64_t idx = ((split * p.query.shape[0] + work.sequence.batch_idx) * heads + row.head) * rows + row.row;
      float* data = grid.partial_out + idx * head_dim_v;
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

/// The warp's rows into its part of the query tile, then to `out`.
template <class Config>
__device__ __forceinline__ void write_out(const typename Config::Products::Out& out, unsigned char* tile,
                                          const AttentionParams& p, const TileGrid& grid, const TileWork& work, int warp_row) {
  using T = typename Config::T;
  using Layout = typename Config::LayoutQ;
  constexpr int kRows = 16 * Config::kRowBlocks, kPerChunk = 16 / sizeof(T), kChunks = Config::kHeadDim / kPerChunk;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < Config::kRowBlocks; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int d = 0; d < Config::Products::kDimBlocks; ++d) {
        const int column = 8 * d + 2 * t;
        unsigned char* data =
            tile + Layout::offset(warp_row + 16 * m + g + 8 * r, column / kPerChunk) + (column % kPerChunk) * sizeof(T);
        if constexpr (sizeof(T) == 2) {
          *reinterpret_cast<uint32_t*>(data) = pack2<T>(out[m][d][2 * r], out[m][d][2 * r + 1]);
        } else {
          *reinterpret_cast<float2*>(data) = make_float2(out[m][d][2 * r], out[m][d][2 * r + 1]);
        }
      }
    }
  }
  __syncwarp();
  const int head_dim_v = static_cast<int>(p.value.shape[3]);
#pragma unroll 4
  for (int idx = lane; idx < kRows * kChunks; idx += 32) {
    const int local = warp_row + idx / kChunks, chunk = idx % kChunks;
    const TileRow row = tile_row<Config::kSplit>(work, grid, local);
    if (!row.exists || chunk * kPerChunk >= head_dim_v) continue;
    T* data = row_data<T>(p.out, work.sequence.batch_idx, row.head, work.sequence.first_row + row.row) + chunk * kPerChunk;
    const unsigned char* source = tile + Layout::offset(local, chunk);
    if (grid.out_by_16) {
      *reinterpret_cast<uint4*>(data) = *reinterpret_cast<const uint4*>(source);
    } else {
      for (int i = 0; i < min(kPerChunk, head_dim_v - chunk * kPerChunk); ++i) data[i] = reinterpret_cast<const T*>(source)[i];
    }
  }
}

}  // namespace fa
