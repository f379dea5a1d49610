// SPDX-License-Identifier: Apache-2.0
// The row of the Hopper kernel for heads of more than 256 columns in the dispatch table.
#pragma once

#include <cstddef>
#include <string>

#include "fa/attention.h"

namespace fa::prefill_sm90_wide {

bool plan(const AttentionParams& params, Plan* plan, std::string* why_not);
size_t max_workspace_bytes(const AttentionParams& largest, const Device& device);
Status launch(const Plan& plan, const AttentionParams& params, const ExecutionContext& context);

}  // namespace fa::prefill_sm90_wide
