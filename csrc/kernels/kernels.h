// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels' rows of the dispatch table, in order of preference. Included by dispatch.cpp.
#pragma once

#include "fa/attention.h"
#include "kernels/decode_splitkv/decode_splitkv.h"
#include "kernels/prefill_sm80/prefill_sm80.h"
#include "kernels/prefill_sm90/prefill_sm90.h"
#include "kernels/prefill_sm90_f32/prefill_sm90_f32.h"
#include "kernels/prefill_sm90_wide/prefill_sm90_wide.h"

#define FA_CUDA_KERNEL(name) {#name, DeviceType::kCuda, name::plan, name::launch}
#ifdef FA_WITH_SM90
#define FA_WIDE_KERNEL                                                                         \
  {"prefill_sm90_wide", DeviceType::kCuda, prefill_sm90_wide::plan, prefill_sm90_wide::launch, \
   prefill_sm90_wide::max_workspace_bytes}
#define FA_HOPPER_KERNELS FA_CUDA_KERNEL(prefill_sm90), FA_CUDA_KERNEL(prefill_sm90_f32), FA_WIDE_KERNEL,
#else
#define FA_HOPPER_KERNELS
#endif
#define FA_DECODE_KERNEL \
  {"decode_splitkv", DeviceType::kCuda, decode_splitkv::plan, decode_splitkv::launch, decode_splitkv::max_workspace_bytes}
#define FA_CUDA_KERNELS FA_DECODE_KERNEL, FA_HOPPER_KERNELS FA_CUDA_KERNEL(prefill_sm80)
