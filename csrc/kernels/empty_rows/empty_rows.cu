// SPDX-License-Identifier: Apache-2.0
// See empty_rows.h. One thread block for each sequence and key head: it looks for empty rows among those of its query heads, and
// ends at once where there are none, which is the rule.
#include "kernels/common/convert.cuh"
#include "kernels/common/launch.h"
#include "kernels/empty_rows/empty_rows.h"
#include "semantics/descale.h"
#include "semantics/sequence.h"

namespace fa {
namespace {

constexpr int kWarps = 16;

/// One key head of one sequence, and the query heads that share it. Values are of type T, the output of type Out.
template <class T, class Out>
struct HeadGroup {
  const AttentionParams& p;
  const Sequence& s;
  int64_t sequence_idx;
  int64_t key_head;
  int64_t heads;  // query heads of the key head

  __device__ int64_t query_head(int64_t i) const { return key_head * heads + i; }

  __device__ bool is_empty(int64_t i, int64_t row) const {
    const auto* lse = static_cast<const float*>(p.lse.data);
    return lse[s.batch_idx * p.lse.stride[0] + query_head(i) * p.lse.stride[1] + (s.first_row + row) * p.lse.stride[2]] ==
           -INFINITY;
  }

  /// Does any of the rows attend no key? For the whole block.
  __device__ bool has_empty_rows() const {
    bool found = false;
    for (int64_t i = 0; i < heads; ++i) {
      for (int64_t row = threadIdx.x; row < s.query_length; row += blockDim.x) found |= is_empty(i, row);
    }
    return __syncthreads_or(found);
  }

  /// mean [D_v]. Each warp adds every kWarps-th key, then their sums are added in order: the result is always the same.
  __device__ void compute_mean(float* mean) const {
    __shared__ float sums[kWarps][32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const T* value = static_cast<const T*>(p.value.data) + s.batch_idx * p.value.stride[0] + key_head * p.value.stride[1] +
                     s.first_key * p.value.stride[2];
    for (int64_t first = 0; first < p.value.shape[3]; first += 32) {
      const bool exists = first + lane < p.value.shape[3];
      float sum = 0.0f;
      if (exists) {
#pragma unroll 8
        for (int64_t key = warp; key < s.num_keys; key += kWarps) sum += to_float(value[key * p.value.stride[2] + first + lane]);
      }
      sums[warp][lane] = sum;
      __syncthreads();
      if (warp == 0 && exists) {
        float total = 0.0f;
        for (int i = 0; i < kWarps; ++i) total += sums[i][lane];
        mean[first + lane] = total / static_cast<float>(s.num_keys);
      }
      __syncthreads();
    }
  }

  /// `mean`: unless there is an empty_row_value.
  __device__ void write(const float* mean) const {
    for (int64_t i = 0; i < heads; ++i) {
      Out* out = static_cast<Out*>(p.out.data) + s.batch_idx * p.out.stride[0] + query_head(i) * p.out.stride[1];
      const float factor = output_factor(p, sequence_idx, query_head(i), key_head);
      const Out* given = nullptr;
      if (p.empty_row_value.present)
        given = static_cast<const Out*>(p.empty_row_value.data) + query_head(i) * p.empty_row_value.stride[0];
      for (int64_t row = threadIdx.x / 32; row < s.query_length; row += kWarps) {
        if (!is_empty(i, row)) continue;
        Out* out_row = out + (s.first_row + row) * p.out.stride[2];
        for (int64_t x = threadIdx.x % 32; x < p.out.shape[3]; x += 32) {
          out_row[x] = given == nullptr ? from_float<Out>(mean[x] * factor) : given[x];
        }
      }
    }
  }
};

template <class T, class Out = T>
__global__ void __launch_bounds__(32 * kWarps)
    fill_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ SequenceRule sequences, bool of_keys_in_use) {
  extern __shared__ float mean[];
  const int64_t key_heads = p.key.shape[1];
  const int64_t sequence_idx = blockIdx.x / key_heads;
  Sequence s = sequences.at(sequence_idx);
  if (of_keys_in_use) s.num_keys = s.mask.kv_length;
  const HeadGroup<T, Out> group{p, s, sequence_idx, blockIdx.x % key_heads, p.query.shape[1] / key_heads};
  const bool given = p.empty_row_value.present;
  if (!group.has_empty_rows() || (s.num_keys == 0 && !given)) return;  // without keys the mean is the 0 that stands there
  if (!given) group.compute_mean(mean);
  group.write(mean);
}

using FillKernel = void (*)(AttentionParams, SequenceRule, bool);

FillKernel kernel_of(DType values, DType output) {
  if (values == DType::kFloat16) return fill_kernel<__half>;
  if (values == DType::kBFloat16) return fill_kernel<__nv_bfloat16>;
  if (values == DType::kFloat32) return fill_kernel<float>;
  if (output == DType::kFloat16) return fill_kernel<Float8, __half>;
  if (output == DType::kBFloat16) return fill_kernel<Float8, __nv_bfloat16>;
  return output == DType::kFloat32 ? fill_kernel<Float8, float> : fill_kernel<Float8>;
}

}  // namespace

Status fill_empty_rows(const AttentionParams& params, bool of_keys_in_use, const ExecutionContext& context) {
  const auto blocks = static_cast<unsigned>(num_sequences(params) * params.key.shape[1]);
  if (blocks == 0) return {};
  const FillKernel kernel = kernel_of(params.query.dtype, params.out.dtype);
  const cudaError_t error =
      launch_kernel(kernel, dim3(blocks), 32 * kWarps, sizeof(float) * params.value.shape[3],
                    static_cast<cudaStream_t>(context.stream), params, sequence_rule(params), of_keys_in_use);
  return cuda_status(error, "What rows without keys yield could not be launched");
}

}  // namespace fa
