// SPDX-License-Identifier: Apache-2.0
// The CPU row of the dispatch table: tiled, streaming attention (FlashAttention-2's loop), memory linear in the sequence.
#pragma once

#include "dispatch.h"

namespace fa::cpu {

bool plan(const AttentionParams& params, Plan* plan, std::string* why_not);
Status launch(const Plan& plan, const AttentionParams& params, const ExecutionContext& context);

}  // namespace fa::cpu
