// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/combine/combine.h"
#include "kernels/common/convert.cuh"
#include "kernels/common/hidden_values.cuh"
#include "kernels/common/launch.h"
#include "kernels/common/reduce.cuh"
#include "kernels/common/spoilt_rows.h"
#include "semantics/sequence.h"
#include "semantics/softmax.h"

namespace fa {
namespace {

constexpr int kWarps = 4;             // rows of a thread block
constexpr float kNoKeys = -INFINITY;  // in place of a weight: the row sees no key of the split. A weight of 0 may have met NaN

/// One warp per row; lanes first over splits (weights into shared memory), then over columns.
template <class T>
__global__ void __launch_bounds__(32 * kWarps)
    combine_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Partials partials,
                   const __grid_constant__ SequenceRule sequences, int64_t num_rows, bool may_spoil) {
  extern __shared__ float shared[];
  float* weights = shared + threadIdx.x / 32 * partials.num_splits;
  const int lane = threadIdx.x % 32;
  const int64_t idx = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32, seqlen_q = p.query.shape[2], heads = p.query.shape[1];
  if (idx >= num_rows) return;
  const int64_t row = idx % seqlen_q, head = idx / seqlen_q % heads, b = idx / seqlen_q / heads;
  const Sequence s = sequences.at(b);
  const bool in_use = row < s.query_length;

  float top = -INFINITY;
  for (int split = lane; split < partials.num_splits; split += 32) top = fmaxf(top, partials.state[split * num_rows + idx].x);
  for (int lanes = 16; lanes > 0; lanes /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, lanes));
  float sum = 0.0f;
  for (int split = lane; split < partials.num_splits; split += 32) {
    const float2 state = partials.state[split * num_rows + idx];
    const float weight = state.y * rescale_factor(state.x, top);
    weights[split] = state.y == 0.0f ? kNoKeys : weight;
    sum += weight;
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  __syncwarp();
  const SoftmaxState keys{top, sum};
  const SoftmaxState all =
      p.sinks.present ? add_sink(keys, static_cast<const float*>(p.sinks.data)[head * p.sinks.stride[0]]) : keys;
  const float factor = rescale_factor(keys.max, all.max) * normalizer(all);

  T* out = static_cast<T*>(p.out.data) + b * p.out.stride[0] + head * p.out.stride[1] + row * p.out.stride[2];
  const int64_t head_dim_v = p.value.shape[3];
  bool spoilt = false;
  for (int64_t column = lane; column < head_dim_v; column += 32) {
    float x = 0.0f;
    for (int split = 0; split < partials.num_splits; ++split) {
      const float weight = weights[split];
      if (weight != kNoKeys) x += weight * partials.out[(split * num_rows + idx) * head_dim_v + column];
    }
    x = in_use && keys.sum != 0.0f ? x * factor : 0.0f;
    out[column] = from_float<T>(x);
    spoilt |= isnan(x) && !isnan(keys.sum);
  }
  if (may_spoil && __any_sync(kAllLanes, spoilt)) {
    mend_row<T>(p, sequences, static_cast<int>(b), static_cast<int>(head), static_cast<int>(row));
  }
  if (lane == 0 && p.lse.present) {
    static_cast<float*>(p.lse.data)[b * p.lse.stride[0] + head * p.lse.stride[1] + row * p.lse.stride[2]] =
        in_use ? lse(all) : -INFINITY;
  }
}

}  // namespace

Status combine(const Partials& partials, const AttentionParams& params, const ExecutionContext& context) {
  const int64_t rows = params.query.shape[0] * params.query.shape[1] * params.query.shape[2];
  if (rows == 0) return {};
  const auto blocks = static_cast<unsigned>((rows + kWarps - 1) / kWarps);
  const size_t shared_bytes = sizeof(float) * kWarps * partials.num_splits;
  const auto kernel = params.query.dtype == DType::kFloat16    ? combine_kernel<__half>
                      : params.query.dtype == DType::kBFloat16 ? combine_kernel<__nv_bfloat16>
                                                               : combine_kernel<float>;
  const cudaError_t error =
      launch_kernel(kernel, dim3(blocks), 32 * kWarps, shared_bytes, static_cast<cudaStream_t>(context.stream), params, partials,
                    sequence_rule(params), rows, may_spoil_rows(params));
  return cuda_status(error, "The merge of split keys could not be launched");
}

}  // namespace fa
