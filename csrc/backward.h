// SPDX-License-Identifier: Apache-2.0
// What a backward kernel offers to the ordered table in backward.cpp, and the rules of memory of a backward pass.
#pragma once

#include <string>

#include "dispatch.h"
#include "fa/backward.h"

namespace fa {

struct BackwardKernel {
  const char* name;
  DeviceType device;

  /// As Kernel::plan, of a problem and gradients that are valid.
  bool (*plan)(const StepParams& params, const Gradients& gradients, BackwardPlan* plan, std::string* why_not);
  /// Called with a plan of its own, tensors that have memory, and workspace enough.
  Status (*launch)(const BackwardPlan& plan, const StepParams& params, const Gradients& gradients,
                   const ExecutionContext& context);
};

/// fa::check_memory of a backward pass, which writes the gradients (memory.cpp).
Status check_memory(const StepParams& params, const Gradients& gradients);

}  // namespace fa
