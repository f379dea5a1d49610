// SPDX-License-Identifier: Apache-2.0
// Launches one instance of the gradient of a bias. Included by the generated instances only (instantiate.cmake).
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <limits>

#include "kernels/backward_rows/backward_rows.h"
#include "kernels/backward_sm90/bias_gradient.cuh"
#include "kernels/backward_sm90/instances.h"
#include "kernels/common/bias_tiles.h"
#include "kernels/common/kernel_attributes.h"
#include "kernels/common/launch.h"
#include "kernels/common/launch_early.h"

namespace fa::backward_sm90 {

template <class C>
Status encode_maps(const AttentionParams& p, const Gradients& gradients, BiasGradientArgs* args) {
  if (Status status = encode_tensor_map(p.query, C::kTile, &args->query); !status.ok()) return status;
  if (Status status = encode_tensor_map(gradients.d_out, C::kTile, &args->d_out); !status.ok()) return status;
  if (Status status = encode_tensor_map(p.key, C::kTile, &args->key); !status.ok()) return status;
  if (Status status = encode_tensor_map(p.value, C::kTile, &args->value); !status.ok()) return status;
  return encode_tensor_map(bias_tensor(p.bias), C::kTile, &args->bias);
}

template <typename T, int kHeadDim>
Status launch_bias_gradient(const BackwardPlan& plan, const AttentionParams& p, const Gradients& gradients,
                            const RowNumbers& rows, const ExecutionContext& context) {
  using C = BiasGradientTraits<T, kHeadDim>;
  BiasGradientArgs args{};
  if (Status status = encode_maps<C>(p, gradients, &args); !status.ok()) return status;
  const TensorView &d_bias = gradients.d_bias, bias = bias_tensor(p.bias);
  const int64_t batches = is_summed(d_bias, 0) ? 1 : d_bias.shape[0], heads = is_summed(d_bias, 1) ? 1 : d_bias.shape[1];
  const int64_t row_tiles = (d_bias.shape[2] + C::kTile - 1) / C::kTile, key_tiles = (d_bias.shape[3] + C::kTile - 1) / C::kTile;
  args.d_bias = d_bias;
  args.sequences = sequence_rule(p);
  args.rows = rows;
  args.row_tiles = Divisor(row_tiles);
  args.key_tiles = Divisor(key_tiles);
  args.heads = Divisor(heads);
  args.num_tiles = static_cast<int>(batches * heads * row_tiles * key_tiles);
  args.visited_batches = static_cast<int>(d_bias.shape[0] / batches);
  args.visited_heads = static_cast<int>(d_bias.shape[1] / heads);
  args.bias_batches = bias.shape[0] > 1;
  args.bias_heads = bias.shape[1] > 1;
  args.entries_differ = p.kv_lengths.present || p.query_offsets.present;
  args.heads_per_key_head = Divisor(p.query.shape[1] / p.key.shape[1]);
  args.scale = p.softmax_scale;
  constexpr size_t kSharedBytes = sizeof(BiasGradientPlan<C>);
  static_assert(kSharedBytes <= kSharedLimit, "plan() asks the device for kSharedLimit bytes, so no block may need more.");
  const auto kernel = bias_gradient_kernel<C>;
  cudaError_t error = allow_shared_memory(kernel, kSharedBytes);
  if (error == cudaSuccess)
    error = launch_early(kernel, std::min(args.num_tiles, plan.device.num_sms), C::kThreads, kSharedBytes,
                         static_cast<cudaStream_t>(context.stream), args);
  return cuda_status(error, "The gradient of the bias could not be launched");
}

}  // namespace fa::backward_sm90
