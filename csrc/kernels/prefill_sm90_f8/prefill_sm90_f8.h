// SPDX-License-Identifier: Apache-2.0
// The row of the Hopper kernel for float8 in the dispatch table.
#pragma once

#include <string>

#include "fa/attention.h"

namespace fa::prefill_sm90_f8 {

bool plan(const AttentionParams& params, Plan* plan, std::string* why_not);
Status launch(const Plan& plan, const AttentionParams& params, const ExecutionContext& context);

}  // namespace fa::prefill_sm90_f8
