// SPDX-License-Identifier: Apache-2.0
// The CPU row of the dispatch table: tiled, streaming attention (FlashAttention-2's loop), memory linear in the sequence.
#pragma once

#include "dispatch.h"

namespace fa::cpu {

bool plan(const StepParams& params, Plan* plan, std::string* why_not);
/// The cache step of params.cache: past and new rows into key and value. launch() only attends.
Status store(const StepParams& params, const ExecutionContext& context);
Status launch(const Plan& plan, const StepParams& params, const ExecutionContext& context);

}  // namespace fa::cpu
