// SPDX-License-Identifier: Apache-2.0
// What a kernel offers to the ordered table in dispatch.cpp. A new kernel is one folder and one row there (kernels/kernels.h).
#pragma once

#include <cstddef>
#include <string>

#include "fa/attention.h"

// For a kernel's plan function, with `std::string* why_not` in scope: where the condition holds, the kernel does not take the
// problem. The sentence is built only for a caller who asks why.
#define FA_REFUSE_IF(condition, sentence)          \
  if (condition) {                                 \
    if (why_not != nullptr) *why_not = (sentence); \
    return false;                                  \
  }

namespace fa {

inline constexpr const char* kNoCuda = "this build has no CUDA kernels (it was made without nvcc, or with FA_CUDA=OFF)";

struct Kernel {
  const char* name;   // its folder, and the word in explain(), NVTX ranges and test ids
  DeviceType device;  // the others refuse themselves

  /// Does the kernel take this problem (params are valid, plan->device is of its type)? True: sets the plan's instance, splits
  /// and workspace_bytes. False: says why in *why_not, unless that is null.
  bool (*plan)(const StepParams& params, Plan* plan, std::string* why_not);
  /// Called with a plan of its own, tensors that have memory, at least one element of output, and workspace enough.
  Status (*launch)(const Plan& plan, const StepParams& params, const ExecutionContext& context);
  /// As fa::max_workspace_bytes, of this kernel; null where the largest problem needs most.
  size_t (*max_workspace_bytes)(const StepParams& largest, const Device& device) = nullptr;
  /// Does it read a cache that is written in place, or in pages, by the cache's own rule? Then it may be given the problem with
  /// its CacheParams, whose new rows have been stored; else all caches are brought into a form that has none.
  bool reads_caches = false;
};

}  // namespace fa
