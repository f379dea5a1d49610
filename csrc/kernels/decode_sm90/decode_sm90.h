// SPDX-License-Identifier: Apache-2.0
// Attention for few query rows against many keys on Hopper, in one launch. A row of the dispatch table.
#pragma once

#include <string>

#include "fa/attention.h"

namespace fa::decode_sm90 {

bool plan(const StepParams& params, Plan* plan, std::string* why_not);
size_t max_workspace_bytes(const StepParams& largest, const Device& device);
Status launch(const Plan& plan, const StepParams& params, const ExecutionContext& context);

}  // namespace fa::decode_sm90
