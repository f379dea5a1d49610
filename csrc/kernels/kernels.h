// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels' rows of the dispatch table, in order of preference. Included by dispatch.cpp.
#pragma once

#include "fa/attention.h"
#include "kernels/decode_sm90/decode_sm90.h"
#include "kernels/decode_splitkv/decode_splitkv.h"
#include "kernels/prefill_sm80/prefill_sm80.h"
#include "kernels/prefill_sm90/prefill_sm90.h"
#include "kernels/prefill_sm90_f32/prefill_sm90_f32.h"
#include "kernels/prefill_sm90_f8/prefill_sm90_f8.h"
#include "kernels/prefill_sm90_wide/prefill_sm90_wide.h"

namespace fa {

// The table's functions of kernels that only attend: nothing but the attention problem of a step is theirs.
template <auto kPlan>
bool plan_attention(const StepParams& params, Plan* plan, std::string* why_not) {
  return kPlan(params, plan, why_not);
}
template <auto kLaunch>
Status launch_attention(const Plan& plan, const StepParams& params, const ExecutionContext& context) {
  return kLaunch(plan, params, context);
}
template <auto kMaxBytes>
size_t max_attention_bytes(const StepParams& largest, const Device& device) {
  return kMaxBytes(largest, device);
}

}  // namespace fa

#define FA_CUDA_KERNEL(name) {#name, DeviceType::kCuda, plan_attention<name::plan>, launch_attention<name::launch>}
#define FA_CUDA_KERNEL_WITH_BOUND(name)                                                  \
  {#name, DeviceType::kCuda, plan_attention<name::plan>, launch_attention<name::launch>, \
   max_attention_bytes<name::max_workspace_bytes>}
#ifdef FA_WITH_SM90
#define FA_HOPPER_DECODE_KERNEL                                                                                \
  {"decode_sm90", DeviceType::kCuda, decode_sm90::plan, decode_sm90::launch, decode_sm90::max_workspace_bytes, \
   true /* reads_caches */},
#define FA_HOPPER_KERNELS                                                                          \
  FA_CUDA_KERNEL(prefill_sm90), FA_CUDA_KERNEL(prefill_sm90_f32), FA_CUDA_KERNEL(prefill_sm90_f8), \
      FA_CUDA_KERNEL_WITH_BOUND(prefill_sm90_wide),
#else
#define FA_HOPPER_DECODE_KERNEL
#define FA_HOPPER_KERNELS
#endif
#define FA_CUDA_KERNELS \
  FA_HOPPER_DECODE_KERNEL FA_CUDA_KERNEL_WITH_BOUND(decode_splitkv), FA_HOPPER_KERNELS FA_CUDA_KERNEL(prefill_sm80)
