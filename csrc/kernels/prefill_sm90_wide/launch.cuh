// SPDX-License-Identifier: Apache-2.0
// Launches one instantiation of prefill_sm90_wide on a problem that supports() has accepted.
#pragma once

#include <cuda_runtime.h>

#include "fa/attention.h"
#include "kernels/cache_step/args.h"
#include "kernels/combine/combine.h"
#include "kernels/common/kernel_attributes.h"
#include "kernels/common/launch.h"
#include "kernels/common/launch_early.h"
#include "kernels/common/tensor_map.h"
#include "kernels/prefill_sm90/launch.cuh"
#include "kernels/prefill_sm90_wide/instances.h"
#include "kernels/prefill_sm90_wide/kernel.cuh"
#include "kernels/prefill_sm90_wide/shape.h"

namespace fa::prefill_sm90_wide {

template <class C>
Status encode_maps(const AttentionParams& p, KernelArgs* args) {
  if (Status status = encode_tensor_map(p.query, kRows, &args->query); !status.ok()) return status;
  if (Status status = encode_tensor_map(p.key, kKeys / 2, &args->key); !status.ok()) return status;
  if (Status status = encode_tensor_map(p.value, C::kBoxValues, &args->value); !status.ok()) return status;
  return encode_tensor_map(p.out, kRows, &args->out);
}

template <class C>
Status launch_config(const Plan& plan, const AttentionParams& p, const ExecutionContext& context) {
  KernelArgs args{};
  if (Status status = encode_maps<C>(p, &args); !status.ok()) return status;
  if (prefill_sm90::num_tiles(p, kPairRows) == 0) return {};
  prefill_sm90::describe_problem(p, kPairRows, &args);
  const Way way = way_of(plan);
  const bool over_grid = way == Way::kOverGrid;
  args.num_splits = way == Way::kSharedSteps ? 1 : plan.num_splits;
  args.may_spoil_rows = may_spoil_rows(p);
  args.over_grid = over_grid;
  args.partial_state = static_cast<float2*>(context.workspace);
  args.partial_out = reinterpret_cast<float*>(args.partial_state + plan.num_splits * num_rows(p));
  const auto kernel = prefill_sm90_wide_kernel<C>;
  static_assert(sizeof(SharedMemory<C>) <= kSharedLimit, "plan() asks the device for kSharedLimit bytes.");
  static_assert(C::kTileN <= cache_step::kMostTileKeys, "Keys that share a tile with seen ones must have been gathered.");
  cudaError_t error = allow_shared_memory(kernel, sizeof(SharedMemory<C>));
  if (error == cudaSuccess) {
    error = launch_early(kernel, args.num_tiles * 2 * plan.num_splits, kThreads, sizeof(SharedMemory<C>),
                         static_cast<cudaStream_t>(context.stream), args, over_grid ? 2 : 2 * plan.num_splits);
  }
  if (error != cudaSuccess || !over_grid) return cuda_status(error, "prefill_sm90_wide could not be launched");
  return combine({args.partial_out, args.partial_state, plan.num_splits}, p, context);
}

template <typename T, int kHeadDim, Variant kVariant>
Status launch_instance(const Plan& plan, const AttentionParams& params, const ExecutionContext& context) {
  static_assert(kHeadDim == kMaxHeadDim);
  constexpr bool kModified = kVariant == Variant::kModified;
  const int pairs = way_of(plan) == Way::kSharedSteps ? plan.num_splits : 1;
  if (pairs == 4) return launch_config<Config<T, kModified, 4>>(plan, params, context);
  if (pairs == 2) return launch_config<Config<T, kModified, 2>>(plan, params, context);
  return launch_config<Config<T, kModified, 1>>(plan, params, context);
}

}  // namespace fa::prefill_sm90_wide
