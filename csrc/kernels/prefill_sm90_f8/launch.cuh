// SPDX-License-Identifier: Apache-2.0
// Launches one instantiation of prefill_sm90_f8 on a problem that plan() has accepted.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/common/kernel_attributes.h"
#include "kernels/common/launch.h"
#include "kernels/common/launch_early.h"
#include "kernels/common/tensor_map.h"
#include "kernels/prefill_sm90/launch.cuh"
#include "kernels/prefill_sm90_f8/instances.h"
#include "kernels/prefill_sm90_f8/kernel.cuh"

namespace fa::prefill_sm90_f8 {

/// The output needs no map: threads write it.
template <class C>
Status encode_tensors(const AttentionParams& p, KernelArgs* args) {
  if (Status status = encode_tensor_map(p.query, prefill_sm90::query_box_rows<C>(), &args->query); !status.ok()) return status;
  if (Status status = encode_tensor_map(p.key, C::kTileN, &args->key); !status.ok()) return status;
  if (Status status = encode_tensor_map(p.value, C::kTileN, &args->value); !status.ok()) return status;
  args->out = args->query;
  return {};
}

template <int kHeadDim, Variant kVariant>
Status launch_instance(const Plan& plan, const AttentionParams& params, const ExecutionContext& context) {
  using C = Traits<kHeadDim, kVariant>;
  KernelArgs args{};
  if (Status status = encode_tensors<C>(params, &args); !status.ok()) return status;
  const int64_t tiles = prefill_sm90::num_tiles(params, C::kTileM);
  if (tiles == 0) return {};
  const bool unequal = prefill_sm90::describe_problem(params, C::kTileM, &args);
  const int blocks = static_cast<int>(std::min<int64_t>(tiles, plan.device.num_sms));
  args.folds = prefill_sm90::folds<C>(params, args, blocks == tiles);
  args.spoilt = prefill_sm90::spoilt_tiles(params, context);
  const auto kernel = prefill_sm90_f8_kernel<C>;
  constexpr int kSharedBytes = sizeof(SharedPlan<C>);
  static_assert(kSharedBytes <= prefill_sm90::kSharedLimit, "plan() asks the device for no more.");
  cudaError_t error = cudaSuccess;
  if (unequal && tiles > blocks) error = prefill_sm90::find_tile_counter(context, &args.tile_counter);
  if (error == cudaSuccess) error = allow_shared_memory(kernel, kSharedBytes);
  if (error == cudaSuccess)
    error = launch_early(kernel, blocks, C::kThreads, kSharedBytes, static_cast<cudaStream_t>(context.stream), args);
  return cuda_status(error, "prefill_sm90_f8 could not be launched");
}

}  // namespace fa::prefill_sm90_f8
