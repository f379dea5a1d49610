// SPDX-License-Identifier: Apache-2.0
// The numbers of query rows for the backward pass, and gradients that are 0 because of where they lie (backward_rows.h). Eight
// lanes work on a row: they read its output and the gradient of it once.
#include "kernels/backward_rows/backward_rows.h"
#include "kernels/common/aligned_rows.h"
#include "kernels/common/convert.cuh"
#include "kernels/common/hidden_values.cuh"
#include "kernels/common/launch.h"

namespace fa {
namespace {

constexpr int kLanes = 8;      // of a row
constexpr int kThreads = 256;  // of a block
constexpr int kRowsOfBlock = kThreads / kLanes;

struct RowJob {
  AttentionParams params;
  Gradients gradients;
  RowNumbers numbers;
  SequenceRule sequences;
  unsigned rows_of_head, blocks_of_head;  // entries of a head, and the thread blocks that work on them
  unsigned* counters;
  int64_t num_counters;
  bool reads_by_16, writes_by_16;  // rows of out and d_out, and of d_query, are whole 16-byte chunks, aligned
  bool has_coarse_rows;            // a log-sum-exp may be so large that its rounding counts
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

/// A lane's share of the product of two rows, and of the sum of 0 times the second, which is NaN where that isn't finite.
struct RowSums {
  float product, zero;
};

template <class T>
__device__ __forceinline__ RowSums sum_row(const T* out, const T* d_out, int columns, int lane, bool by_16) {
  RowSums sums{0.0f, 0.0f};
  const auto add = [&](T x, T d) {
    sums.product = fmaf(to_float(x), to_float(d), sums.product);
    sums.zero = fmaf(to_float(d), 0.0f, sums.zero);
  };
  if (!by_16) {
    for (int i = lane; i < columns; i += kLanes) add(out[i], d_out[i]);
    return sums;
  }
  constexpr int kPerChunk = 16 / sizeof(T);
#pragma unroll 2
  for (int i = lane; i < columns / kPerChunk; i += kLanes) {
    const uint4 a = reinterpret_cast<const uint4*>(out)[i], b = reinterpret_cast<const uint4*>(d_out)[i];
#pragma unroll
    for (int j = 0; j < kPerChunk; ++j) add(reinterpret_cast<const T*>(&a)[j], reinterpret_cast<const T*>(&b)[j]);
  }
  return sums;
}

/// Does the tile of rows that the row is in see a key, by lengths and windows?
__device__ __forceinline__ bool tile_sees_keys(const RowJob& job, const RowPlace& place) {
  const int64_t first = place.row / job.numbers.tiles.tile_rows * job.numbers.tiles.tile_rows;
  int64_t last = first + job.numbers.tiles.tile_rows - 1;
  if (last >= place.sequence.query_length) last = place.sequence.query_length - 1;
  const KeyRange keys = place.sequence.mask.key_range(first, last);
  return keys.begin < keys.end;
}

struct RowResult {
  float reference, rest, delta;
};

/// Where the log-sum-exp is so large that its rounding counts, the softmax is summed up anew. For whole warps: `is_coarse` tells
/// which of the lanes' rows need it.
template <class T>
__device__ __noinline__ void mend_coarse_rows(const RowJob& job, const RowPlace& place, bool is_coarse, RowResult* result) {
  unsigned coarse = __ballot_sync(kAllLanes, is_coarse);
  while (coarse != 0) {
    const int lane = __ffs(coarse) - 1;
    coarse &= ~(((1u << kLanes) - 1) << lane);
    const int sequence_idx = __shfl_sync(kAllLanes, place.sequence_idx, lane), head = __shfl_sync(kAllLanes, place.head, lane);
    const int64_t row = __shfl_sync(kAllLanes, place.row, lane);
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
    if (threadIdx.x % 32 / kLanes == lane / kLanes)
      *result = {state.max, log2f(state.sum) + (has_others ? others * kLog2E : 0.0f), result->delta};
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) prepare_rows_kernel(const __grid_constant__ RowJob job) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t i = thread; i < job.num_counters; i += static_cast<int64_t>(gridDim.x) * kThreads) job.counters[i] = 0;
  if (job.rows_of_head == 0) return;
  const unsigned head = blockIdx.x / job.blocks_of_head, lane = threadIdx.x % kLanes;
  const unsigned of_head = (blockIdx.x - head * job.blocks_of_head) * kRowsOfBlock + threadIdx.x / kLanes;
  const bool exists = of_head < job.rows_of_head && head < job.params.query.shape[1];
  const int64_t entry = static_cast<int64_t>(head) * job.rows_of_head + of_head;
  const AttentionParams& p = job.params;
  const RowPlace place = row_place(job.numbers.tiles, job.sequences, head, exists ? of_head : 0);
  const Sequence& s = place.sequence;
  const bool is_row = exists && place.row >= 0 && place.row < s.num_rows, in_use = is_row && place.row < s.query_length;
  const int64_t row = s.first_row + (is_row ? place.row : 0);
  RowResult result{INFINITY, 0.0f, 0.0f};
  RowSums sums{0.0f, 0.0f};
  float lse = -INFINITY;
  if (in_use) {
    lse = *row_of<float>(p.lse, s.batch_idx, place.head, row);
    sums =
        sum_row<T>(row_of<T>(p.out, s.batch_idx, place.head, row), row_of<T>(job.gradients.d_out, s.batch_idx, place.head, row),
                   static_cast<int>(p.out.shape[3]), lane, job.reads_by_16);
  }
  sums = {over_lanes(sums.product), over_lanes(sums.zero)};
  if (in_use && lse != -INFINITY) {
    const float d_lse = job.gradients.d_lse.present ? *row_of<float>(job.gradients.d_lse, s.batch_idx, place.head, row) : 0.0f;
    const float delta = sums.product - d_lse, number = lse * 0.0f + sums.zero + delta * 0.0f;  // NaN where one isn't finite
    result = {isnan(number) ? NAN : lse, 0.0f, isnan(number) ? 0.0f : delta};
  }
  if (job.has_coarse_rows) {
    constexpr float kFine = sizeof(T) == 4 ? 32.0f : 256.0f;  // below, rounding changes weights by less than 2e-6, or 2e-5
    const bool is_coarse = fabsf(result.reference) > kFine && result.reference != INFINITY;
    mend_coarse_rows<T>(job, place, is_coarse, &result);
  }
  if (exists && lane == 0) {
    job.numbers.reference[entry] = job.numbers.rest == nullptr ? result.reference * kLog2E : result.reference;
    if (job.numbers.rest != nullptr) job.numbers.rest[entry] = result.rest;
    job.numbers.delta[entry] = result.delta;
  }
  if (is_row && (!in_use || p.mask.present || !tile_sees_keys(job, place))) {
    const TensorView& d = job.gradients.d_query;
    clear_row(row_of<T>(d, s.batch_idx, place.head, row), static_cast<int>(d.shape[3]), lane, job.writes_by_16);
  }
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
  const int64_t rows = numbers.tiles.of_head * numbers.tiles.tile_rows;
  return {params,
          gradients,
          numbers,
          sequence_rule(params),
          static_cast<unsigned>(rows),
          static_cast<unsigned>((rows + kRowsOfBlock - 1) / kRowsOfBlock),
          nullptr,
          0,
          is_by(params.out, 16) && is_by(gradients.d_out, 16),
          is_by(gradients.d_query, 16),
          numbers.rest != nullptr && params.bias.present};
}

template <class T>
Status prepare(const RowJob& job, cudaStream_t stream) {
  constexpr const char* kWhat = "The backward pass could not be launched";
  const int64_t heads = job.params.query.shape[1], rows = job.numbers.tiles.of_head * job.numbers.tiles.tile_rows;
  int64_t blocks = heads * ((rows + kRowsOfBlock - 1) / kRowsOfBlock);
  if (blocks > INT32_MAX || rows > INT32_MAX) return {StatusCode::kUnsupported, "The problem has more than 2^31 query rows."};
  if (blocks == 0 && job.num_counters > 0) blocks = 1;
  if (blocks > 0) {
    const cudaError_t error = launch_kernel(prepare_rows_kernel<T>, dim3(blocks), kThreads, 0, stream, job);
    if (error != cudaSuccess) return cuda_status(error, kWhat);
  }
  if (!job.numbers.tiles.packed) return {};
  return cuda_status(launch_kernel(clear_outside_kernel<T>, dim3(256), kThreads, 0, stream, job), kWhat);
}

}  // namespace

RowNumbers row_numbers(const AttentionParams& params, int tile_rows, bool natural, Workspace* workspace) {
  const RowTiles tiles = row_tiles(params, tile_rows);
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
