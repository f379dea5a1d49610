// SPDX-License-Identifier: Apache-2.0
// Launches one instantiation of backward_sm90 on a problem that plan() has accepted.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/backward_sm90/backward_sm90.h"
#include "kernels/backward_sm90/instances.h"
#include "kernels/backward_sm90/kernel.cuh"
#include "kernels/common/bias_tiles.h"
#include "kernels/common/kernel_attributes.h"
#include "kernels/common/launch.h"
#include "kernels/common/launch_early.h"
#include "kernels/common/tensor_map.h"
#include "semantics/softmax.h"

namespace fa::backward_sm90 {

template <class C>
Status encode_maps(const AttentionParams& p, const Gradients& gradients, KernelArgs* args) {
  if (Status status = encode_tensor_map(p.query, C::kTileM, &args->query); !status.ok()) return status;
  if (Status status = encode_tensor_map(gradients.d_out, C::kTileM, &args->d_out); !status.ok()) return status;
  if (Status status = encode_tensor_map(p.key, C::kTileN / C::kBlocks, &args->key); !status.ok()) return status;
  if (C::kHasBias) {
    if (Status status = encode_tensor_map(bias_tensor(p.bias), C::kTileM, &args->bias); !status.ok()) return status;
  }
  return encode_tensor_map(p.value, C::kTileN / C::kBlocks, &args->value);
}

/// All of the arguments but the tensor maps.
template <class C>
void describe_problem(const AttentionParams& p, const Gradients& gradients, const Memory& memory, int num_sms, KernelArgs* args) {
  args->d_query = gradients.d_query;
  args->d_key = gradients.d_key;
  args->d_value = gradients.d_value;
  args->sequences = sequence_rule(p);
  args->rows = memory.rows;
  args->turns = memory.counters;
  args->ticket = memory.counters + memory.num_counters - 1;
  args->sums = memory.sums;
  args->query_tiles_of_head = static_cast<int>(memory.rows.tiles.of_head);
  args->key_tiles = row_tiles(p, p.key, C::kTileN);
  args->num_key_tiles = static_cast<int>(C::kPacked ? args->key_tiles.of_head : args->key_tiles.of_sequence);
  args->heads_per_key_head = static_cast<int>(p.query.shape[1] / p.key.shape[1]);
  args->num_items = static_cast<int>(args->num_key_tiles * p.key.shape[1] * p.query.shape[0]);
  // As many heads together as give all multiprocessors one item, or two if it has up to 64 columns: the first key tiles of all of
  // them start, then the second … Fewer key tiles of a head then wait for one another; with more, L2 would not hold all sums.
  const int64_t tiles_of_sequence =  // of one of mean length
      C::kPacked ? args->num_key_tiles / std::max<int64_t>(1, num_sequences(p)) : args->num_key_tiles;
  const int64_t together = std::max<int64_t>(1, num_sms * 128 / C::kHeadDim / tiles_of_sequence);
  args->rows_start_later = p.window_right >= 0;
  args->rows_shorten = args->rows_start_later && (p.window_left < 0 || p.window_left >= p.key.shape[2]);
  args->order = TileOrder(p.query.shape[0], p.key.shape[1], args->num_key_tiles, together,
                          args->rows_shorten ? 2 * together : together, batch_shares_bias(p));
  const TensorView bias = bias_tensor(p.bias);
  args->bias_batches = bias.shape[0] > 1;
  args->bias_heads = bias.shape[1] > 1;
  args->scale = p.softmax_scale;
  args->scale_log2 = p.softmax_scale * kLog2E;
}

/// `kernel` takes items by C, with shared memory as `Plan` says.
template <class C, class Plan>
Status launch_config(void (*kernel)(KernelArgs), const BackwardPlan& plan, const AttentionParams& p, const Gradients& gradients,
                     const ExecutionContext& context) {
  Workspace workspace(context.workspace);
  const Memory memory = take_memory(p, C::kHeadDim, C::kOfVariant, &workspace);
  KernelArgs args{};
  if (Status status = encode_maps<C>(p, gradients, &args); !status.ok()) return status;
  describe_problem<C>(p, gradients, memory, plan.device.num_sms, &args);
  if (Status status = prepare_rows(p, gradients, memory.rows, memory.counters, memory.num_counters, context); !status.ok())
    return status;
  constexpr int kSharedBytes = sizeof(Plan);
  static_assert(kSharedBytes <= kSharedLimit, "plan() asks the device for kSharedLimit bytes, so no block may need more.");
  const int blocks = C::kBlocks * std::min(args.num_items, plan.device.num_sms / C::kBlocks);
  cudaError_t error = allow_shared_memory(kernel, kSharedBytes);
  if (error == cudaSuccess)
    error = launch_early(kernel, blocks, C::kThreads, kSharedBytes, static_cast<cudaStream_t>(context.stream), args, C::kBlocks);
  if (error != cudaSuccess) return cuda_status(error, "backward_sm90 could not be launched");
  if constexpr (C::kHasBias) {
    if (gradients.d_bias.present)
      return launch_bias_gradient<typename C::T, C::kHeadDim>(plan, p, gradients, memory.rows, context);
  }
  return gradients.d_sinks.present ? d_sinks_of_rows(p, gradients, memory.rows, context) : Status{};
}

template <typename T, int kHeadDim, Variant kVariant>
Status launch_instance(const BackwardPlan& plan, const AttentionParams& params, const Gradients& gradients,
                       const ExecutionContext& context) {
  if constexpr (blocks_of_item(kHeadDim) == 2) {
    using C = PairTraits<T>;
    return launch_config<C, PairPlan<C>>(backward_sm90_pair_kernel<C>, plan, params, gradients, context);
  } else {
    using C = Traits<T, kHeadDim, kVariant>;
    return launch_config<C, SharedPlan<C>>(backward_sm90_kernel<C>, plan, params, gradients, context);
  }
}

}  // namespace fa::backward_sm90
