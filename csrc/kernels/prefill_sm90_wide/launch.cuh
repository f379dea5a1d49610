// SPDX-License-Identifier: Apache-2.0
// Launches one instantiation of prefill_sm90_wide on a problem that supports() has accepted.
#pragma once

#include <cuda_runtime.h>

#include "fa/attention.h"
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

inline Status encode_maps(const AttentionParams& p, KernelArgs* args) {
  if (Status status = encode_tensor_map(p.query, kRows, &args->query); !status.ok()) return status;
  if (Status status = encode_tensor_map(p.key, kKeys / 2, &args->key); !status.ok()) return status;
  if (Status status = encode_tensor_map(p.value, kSlotKeys, &args->value); !status.ok()) return status;
  return encode_tensor_map(p.out, kRows, &args->out);
}

template <typename T, int kHeadDim, Variant kVariant>
Status launch_instance(const Plan& plan, const AttentionParams& p, const ExecutionContext& context) {
  static_assert(kHeadDim == kMaxHeadDim);
  KernelArgs args{};
  if (Status status = encode_maps(p, &args); !status.ok()) return status;
  if (prefill_sm90::num_tiles(p, kPairRows) == 0) return {};
  prefill_sm90::describe_problem(p, kPairRows, &args);
  const bool over_grid = splits_over_grid(plan);
  const int cluster = over_grid ? 2 : 2 * plan.num_splits;
  args.num_splits = plan.num_splits;
  args.may_spoil_rows = may_spoil_rows(p);
  args.over_grid = over_grid;
  args.partial_state = static_cast<float2*>(context.workspace);
  args.partial_out = reinterpret_cast<float*>(args.partial_state + plan.num_splits * num_rows(p));
  const auto kernel = prefill_sm90_wide_kernel<Config<T, kVariant == Variant::kModified>>;
  cudaError_t error = allow_shared_memory(kernel, sizeof(SharedMemory));
  if (error == cudaSuccess) {
    error = launch_early(kernel, args.num_tiles * 2 * plan.num_splits, kThreads, sizeof(SharedMemory),
                         static_cast<cudaStream_t>(context.stream), args, cluster);
  }
  if (error != cudaSuccess || !over_grid) return cuda_status(error, "prefill_sm90_wide could not be launched");
  return combine({args.partial_out, args.partial_state, plan.num_splits}, p, context);
}

}  // namespace fa::prefill_sm90_wide
