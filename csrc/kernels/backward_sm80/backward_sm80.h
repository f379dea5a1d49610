// SPDX-License-Identifier: Apache-2.0
// The backward pass on every GPU from Ampere on. A row of the table of backward kernels (kernels/backward_kernels.h).
#pragma once

#include <string>

#include "fa/backward.h"

namespace fa::backward_sm80 {

bool plan(const StepParams& params, const Gradients& gradients, BackwardPlan* plan, std::string* why_not);
Status launch(const BackwardPlan& plan, const StepParams& params, const Gradients& gradients, const ExecutionContext& context);

}  // namespace fa::backward_sm80
