// SPDX-License-Identifier: Apache-2.0
// The row of the Hopper kernel in the dispatch table: attention by wgmma, TMA and warp specialisation.
#pragma once

#include <cstddef>
#include <string>

#include "fa/attention.h"

namespace fa::prefill_sm90 {

bool plan(const AttentionParams& params, Plan* plan, std::string* why_not);
Status launch(const Plan& plan, const AttentionParams& params, const ExecutionContext& context);

}  // namespace fa::prefill_sm90
