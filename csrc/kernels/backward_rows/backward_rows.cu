// SPDX-License-Identifier: Apache-2.0
// The numbers of query rows for the backward pass, and gradients that are 0 because of where they lie (backward_rows.h). A thread
// block has a tile of rows, which are of one sequence, and eight lanes a row: they read its output and the gradient of it once.
#include "kernels/backward_rows/backward_rows.h"
#include "kernels/common/aligned_rows.h"
#include "kernels/common/convert.cuh"
#include "kernels/common/divisor.h"
#include "kernels/common/hidden_values.cuh"
#include "kernels/common/launch.h"

namespace fa {
namespace {

constexpr int kLanes = 8;      // of a row
constexpr int kThreads = 256;  // of a block
constexpr int kRowsOfBlock = kThreads / kLanes;
constexpr int kRowsAtOnce = 4;  // of eight lanes: a row alone is a few chunks, and most of its time the way from memory
static_assert(kRowsAtOnce <= kLanes, "Each row has a lane that finishes it.");

struct RowJob {
  AttentionParams params;
  Gradients gradients;
  RowNumbers numbers;
  SequenceRule sequences;
  Divisor heads;  // of query
  unsigned* counters;
  int64_t num_counters;
  bool reads_by_16, writes_by_16;  // rows of out and d_out, and of d_query, are whole 16-byte chunks, aligned
};

template <class T>
__device__ __forceinline__ T* row_of(const TensorView& t, int64_t b, int64_t h, int64_t row) {
  return static_cast<T*>(t.data) + b * t.stride[0] + h * t.stride[1] + row * t.stride[2];
}

__device__ __forceinline__ float over_lanes(float x) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

/// 0 into a row, by its lanes.
template <class T>
__device__ __forceinline__ void clear_row(T* row, int columns, int lane, bool by_16) {
  if (by_16) {
    constexpr int kPerChunk = 16 / sizeof(T);
    for (int i = lane; i < columns / kPerChunk; i += kLanes) reinterpret_cast<uint4*>(row)[i] = make_uint4(0, 0, 0, 0);
  } else {
    for (int i = lane; i < columns; i += kLanes) row[i] = T(0.0f);
  }
}

/// A tile of entries of the arrays, of one head and one sequence, by their numbers within the tile.
struct TileOfRows {
  int head, sequence_idx, batch_idx;
  int64_t first_entry;            // of the arrays
  int64_t first_row, tensor_row;  // entry 0's in the sequence, and in the tensors; below 0 where the sequence begins later
  int begin, used_end, end;       // entries that are rows; those before used_end are in use
  bool sees_keys;                 // any of them, by lengths and windows

  __device__ __forceinline__ bool is_in_use(int entry) const { return entry >= begin && entry < used_end; }
};

__device__ __forceinline__ TileOfRows tile_of_rows(const RowJob& job, int head, unsigned tile) {
  const RowTiles& tiles = job.numbers.tiles;
  const RowPlace place = row_place(tiles, job.sequences, head, tile * tiles.tile_rows);
  const Sequence& s = place.sequence;
  const auto entry_of = [&](int64_t row) { return static_cast<int>(SequenceRule::clamp(row - place.row, 0, tiles.tile_rows)); };
  TileOfRows rows{head,
                  place.sequence_idx,
                  static_cast<int>(s.batch_idx),
                  (head * tiles.of_head + tile) * tiles.tile_rows,
                  place.row,
                  s.first_row + place.row,
                  entry_of(0),
                  entry_of(s.query_length < s.num_rows ? s.query_length : s.num_rows),
                  entry_of(s.num_rows),
                  false};
  const int64_t last = place.row + tiles.tile_rows - 1;
  const KeyRange keys = s.mask.key_range(place.row, last < s.query_length ? last : s.query_length - 1);
  rows.sees_keys = keys.begin < keys.end;
  return rows;
}

/// A lane's share of the product of two rows, and of the sum of 0 times the second, which is NaN where that isn't finite.
struct RowSums {
  float product, zero;

  template <class T>
  __device__ __forceinline__ void add(T out, T d_out) {
    product = fmaf(to_float(out), to_float(d_out), product);
    zero = fmaf(to_float(d_out), 0.0f, zero);
  }
};

/// The sums of entries first, first + kRowsOfBlock … of the tile, kRowsAtOnce of them, lane u getting the u-th.
template <class T>
__device__ __forceinline__ RowSums sum_rows(const RowJob& job, const TileOfRows& rows, int first, int lane) {
  const T* const out = row_of<T>(job.params.out, rows.batch_idx, rows.head, rows.tensor_row + first);
  const T* const d_out = row_of<T>(job.gradients.d_out, rows.batch_idx, rows.head, rows.tensor_row + first);
  const int64_t step = kRowsOfBlock * job.params.out.stride[2], d_step = kRowsOfBlock * job.gradients.d_out.stride[2];
  const int columns = static_cast<int>(job.params.out.shape[3]);
  RowSums sums[kRowsAtOnce] = {};
  if (job.reads_by_16) {
    constexpr int kPerChunk = 16 / sizeof(T);
#pragma unroll 1
    for (int i = lane; i < columns / kPerChunk; i += kLanes) {
      uint4 a[kRowsAtOnce], b[kRowsAtOnce];
#pragma unroll
      for (int u = 0; u < kRowsAtOnce; ++u) {
        a[u] = b[u] = make_uint4(0, 0, 0, 0);
        if (!rows.is_in_use(first + u * kRowsOfBlock)) continue;
        a[u] = reinterpret_cast<const uint4*>(out + u * step)[i];
        b[u] = reinterpret_cast<const uint4*>(d_out + u * d_step)[i];
      }
#pragma unroll
      for (int u = 0; u < kRowsAtOnce; ++u) {
#pragma unroll
        for (int j = 0; j < kPerChunk; ++j)
          sums[u].add(reinterpret_cast<const T*>(&a[u])[j], reinterpret_cast<const T*>(&b[u])[j]);
      }
    }
  } else {
#pragma unroll 1
    for (int i = lane; i < columns; i += kLanes) {
#pragma unroll
      for (int u = 0; u < kRowsAtOnce; ++u)
        if (rows.is_in_use(first + u * kRowsOfBlock)) sums[u].add(out[u * step + i], d_out[u * d_step + i]);
    }
  }
  RowSums own{0.0f, 0.0f};
#pragma unroll
  for (int u = 0; u < kRowsAtOnce; ++u) {
    const RowSums all{over_lanes(sums[u].product), over_lanes(sums[u].zero)};
    if (lane == u) own = all;
  }
  return own;
}

struct RowResult {
  float reference, rest, delta;
};

/// Where the log-sum-exp is so large that its rounding counts, the softmax is summed up anew. For whole warps: each lane has a
/// row of the sequence, `own_row`, and `is_coarse` tells whether that needs it.
template <class T>
__device__ __noinline__ void mend_coarse_rows(const RowJob& job, int sequence_idx, int head, int64_t own_row, bool is_coarse,
                                              RowResult* result) {
  for (unsigned coarse = __ballot_sync(kAllLanes, is_coarse); coarse != 0; coarse &= coarse - 1) {
    const int lane = __ffs(coarse) - 1;
    const int64_t row = __shfl_sync(kAllLanes, own_row, lane);
    const Sequence sequence = job.sequences.at(sequence_idx);
    const RowView<T> view{job.params, sequence, sequence_idx, head, row};
    float columns[kColumnsOfLane];
    SoftmaxState state = attend_seen(view, 0, 0, columns);
    if (job.params.sinks.present)
      state = add_sink(state, static_cast<const float*>(job.params.sinks.data)[head * job.params.sinks.stride[0]]);
    // Where the log-sum-exp given is of more keys than are here, by far more than its rounding, the weights stay a part of
    // theirs.
    const float given = result->reference, others = given - lse(state);
    const bool has_others = others > fmaxf(0x1p-6f, fabsf(given) * 0x1p-20f);
    if (threadIdx.x % 32 == lane) *result = {state.max, log2f(state.sum) + (has_others ? others * kLog2E : 0.0f), result->delta};
  }
}

/// The numbers of a lane's own row, entry `own` of the tile. kMends: a log-sum-exp may be so large that its rounding counts.
template <class T, bool kMends>
__device__ __forceinline__ RowResult result_of_row(const RowJob& job, const TileOfRows& rows, int own, float lse, float d_lse,
                                                   RowSums sums) {
  RowResult result{INFINITY, 0.0f, 0.0f};
  if (lse != -INFINITY) {
    const float delta = sums.product - d_lse, number = lse * 0.0f + sums.zero + delta * 0.0f;  // NaN where one isn't finite
    result = {isnan(number) ? NAN : lse, 0.0f, isnan(number) ? 0.0f : delta};
  }
  if constexpr (kMends) {
    constexpr float kFine = sizeof(T) == 4 ? 32.0f : 256.0f;  // below, rounding changes weights by less than 2e-6, or 2e-5
    const bool is_coarse = fabsf(result.reference) > kFine && result.reference != INFINITY;
    mend_coarse_rows<T>(job, rows.sequence_idx, rows.head, rows.first_row + own, is_coarse, &result);
  }
  return result;
}

/// 0 into the gradients of queries that aren't in use or see no key, and with a mask, which may hide all keys, of all.
template <class T>
__device__ __forceinline__ void clear_rows(const RowJob& job, const TileOfRows& rows, int lane) {
  const bool all = job.params.mask.present || !rows.sees_keys;
  if (!all && rows.used_end == rows.end) return;
  const TensorView& d = job.gradients.d_query;
  for (int entry = threadIdx.x / kLanes; entry < rows.end; entry += kRowsOfBlock) {
    if (entry < rows.begin || (!all && rows.is_in_use(entry))) continue;
    clear_row(row_of<T>(d, rows.batch_idx, rows.head, rows.tensor_row + entry), static_cast<int>(d.shape[3]), lane,
              job.writes_by_16);
  }
}

/// Blocks of neighbouring heads are neighbours: often so are their rows in memory.
template <class T, bool kMends>
__global__ void __launch_bounds__(kThreads, kMends ? 2 : 4) prepare_rows_kernel(const __grid_constant__ RowJob job) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t i = thread; i < job.num_counters; i += static_cast<int64_t>(gridDim.x) * kThreads) job.counters[i] = 0;
  const unsigned tile = job.heads.quotient(blockIdx.x), head = blockIdx.x - tile * job.heads.divisor;
  if (tile >= job.numbers.tiles.of_head || head >= job.params.query.shape[1]) return;
  __shared__ TileOfRows shared;  // found by one thread: some 300 instructions, as many as a thread needs for its rows
  if (threadIdx.x == 0) shared = tile_of_rows(job, head, tile);
  __syncthreads();
  const TileOfRows rows = shared;
  const int lane = threadIdx.x % kLanes, tile_rows = job.numbers.tiles.tile_rows;
  const TensorView &lse_view = job.params.lse, &d_lse_view = job.gradients.d_lse;
#pragma unroll 1
  for (int begin = 0; begin < tile_rows; begin += kRowsAtOnce * kRowsOfBlock) {
    const int first = begin + threadIdx.x / kLanes, own = first + lane * kRowsOfBlock;  // the lane finishes its own
    const bool finishes = lane < kRowsAtOnce && own < tile_rows, in_use = finishes && rows.is_in_use(own);
    float lse = -INFINITY, d_lse = 0.0f;
    if (in_use) lse = *row_of<float>(lse_view, rows.batch_idx, head, rows.tensor_row + own);
    if (in_use && d_lse_view.present) d_lse = *row_of<float>(d_lse_view, rows.batch_idx, head, rows.tensor_row + own);
    const RowSums sums = sum_rows<T>(job, rows, first, lane);
    const RowResult result = result_of_row<T, kMends>(job, rows, own, lse, d_lse, sums);
    if (!finishes) continue;
    const int64_t entry = rows.first_entry + own;
    job.numbers.reference[entry] = job.numbers.rest == nullptr ? result.reference * kLog2E : result.reference;
    if (job.numbers.rest != nullptr) job.numbers.rest[entry] = result.rest;
    job.numbers.delta[entry] = result.delta;
  }
  clear_rows<T>(job, rows, lane);
}

/// Gradients of rows and keys that are in none of the packed sequences.
template <class T>
__global__ void __launch_bounds__(kThreads) clear_outside_kernel(const __grid_constant__ RowJob job) {
  const int lane = threadIdx.x % kLanes;
  const TensorView* views[3] = {&job.gradients.d_query, &job.gradients.d_key, &job.gradients.d_value};
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRowsOfBlock;
  for (int i = 0; i < 3; ++i) {
    const TensorView& d = *views[i];
    const IndexView& starts = i == 0 ? job.sequences.cu_seqlens_q : job.sequences.cu_seqlens_kv;
    const int64_t begin = starts.at(0), end = starts.at(job.sequences.num_sequences);
    for (int64_t at = first; at < d.shape[1] * d.shape[2]; at += step) {
      const int64_t head = at / d.shape[2], row = at - head * d.shape[2];
      if (row < begin || row >= end) clear_row(row_of<T>(d, 0, head, row), static_cast<int>(d.shape[3]), lane, false);
    }
  }
}

/// Block h sums up head h: the sink's weight in each row times -D. Always in the same order.
__global__ void __launch_bounds__(kThreads) d_sinks_kernel(const __grid_constant__ RowJob job) {
  __shared__ double of_thread[kThreads];
  const int64_t head = blockIdx.x, rows = job.numbers.tiles.of_head * job.numbers.tiles.tile_rows;
  const float sink = static_cast<const float*>(job.params.sinks.data)[head * job.params.sinks.stride[0]];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < rows && sink != -INFINITY; i += kThreads) {
    const int64_t entry = head * rows + i;
    const float reference = job.numbers.reference[entry];
    const float exponent =
        job.numbers.rest == nullptr ? fmaf(sink, kLog2E, -reference) : fmaf(sink - reference, kLog2E, -job.numbers.rest[entry]);
    sum -= exp2f(exponent) * job.numbers.delta[entry];
  }
  of_thread[threadIdx.x] = sum;
  for (int count = kThreads / 2; count > 0; count /= 2) {
    __syncthreads();
    if (threadIdx.x < count) of_thread[threadIdx.x] += of_thread[threadIdx.x + count];
  }
  if (threadIdx.x == 0) static_cast<float*>(job.gradients.d_sinks.data)[head * job.gradients.d_sinks.stride[0]] = of_thread[0];
}

RowJob job_of(const AttentionParams& params, const Gradients& gradients, const RowNumbers& numbers) {
  return {params,
          gradients,
          numbers,
          sequence_rule(params),
          Divisor(params.query.shape[1] > 0 ? params.query.shape[1] : 1),
          nullptr,
          0,
          is_by(params.out, 16) && is_by(gradients.d_out, 16),
          is_by(gradients.d_query, 16)};
}

template <class T>
Status prepare(const RowJob& job, cudaStream_t stream) {
  constexpr const char* kWhat = "The backward pass could not be launched";
  const int64_t rows = job.numbers.tiles.of_head * job.numbers.tiles.tile_rows;
  int64_t blocks = job.params.query.shape[1] * job.numbers.tiles.of_head;
  if (blocks > INT32_MAX || rows > INT32_MAX) return {StatusCode::kUnsupported, "The problem has more than 2^31 query rows."};
  if (blocks == 0 && job.num_counters > 0) blocks = 1;
  if (blocks > 0) {
    const bool mends = job.numbers.rest != nullptr && job.params.bias.present;
    const cudaError_t error = launch_kernel(mends ? prepare_rows_kernel<T, true> : prepare_rows_kernel<T, false>, dim3(blocks),
                                            kThreads, 0, stream, job);
    if (error != cudaSuccess) return cuda_status(error, kWhat);
  }
  if (!job.numbers.tiles.packed) return {};
  return cuda_status(launch_kernel(clear_outside_kernel<T>, dim3(256), kThreads, 0, stream, job), kWhat);
}

}  // namespace

RowNumbers row_numbers(const AttentionParams& params, int tile_rows, bool natural, Workspace* workspace) {
  const RowTiles tiles = row_tiles(params, params.query, tile_rows);
  const int64_t count = params.query.shape[1] * tiles.of_head * tile_rows;
  float* const reference = workspace->take<float>(count);
  float* const rest = natural ? workspace->take<float>(count) : nullptr;
  return {tiles, reference, rest, workspace->take<float>(count)};
}

Status prepare_rows(const AttentionParams& params, const Gradients& gradients, const RowNumbers& numbers, unsigned* counters,
                    int64_t num_counters, const ExecutionContext& context) {
  RowJob job = job_of(params, gradients, numbers);
  job.counters = counters;
  job.num_counters = num_counters;
  const auto stream = static_cast<cudaStream_t>(context.stream);
  if (params.query.dtype == DType::kFloat32) return prepare<float>(job, stream);
  if (params.query.dtype == DType::kFloat16) return prepare<__half>(job, stream);
  return prepare<__nv_bfloat16>(job, stream);
}

Status d_sinks_of_rows(const AttentionParams& params, const Gradients& gradients, const RowNumbers& numbers,
                       const ExecutionContext& context) {
  const RowJob job = job_of(params, gradients, numbers);
  const int64_t heads = gradients.d_sinks.shape[0];
  if (heads == 0) return {};
  return cuda_status(launch_kernel(d_sinks_kernel, dim3(heads), kThreads, 0, static_cast<cudaStream_t>(context.stream), job),
                     "The gradient of the sinks could not be launched");
}

}  // namespace fa
