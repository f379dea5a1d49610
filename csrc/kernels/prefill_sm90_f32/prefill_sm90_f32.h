// SPDX-License-Identifier: Apache-2.0
// The row of the Hopper kernel for float32 tensors in the dispatch table: attention by wgmma on TF32 operands, TMA and warp
// specialisation.
#pragma once

#include <string>

#include "fa/attention.h"

namespace fa::prefill_sm90_f32 {

bool plan(const AttentionParams& params, Plan* plan, std::string* why_not);
Status launch(const Plan& plan, const AttentionParams& params, const ExecutionContext& context);

}  // namespace fa::prefill_sm90_f32
