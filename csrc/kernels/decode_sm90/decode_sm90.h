// SPDX-License-Identifier: Apache-2.0
// Attention for few query rows against many keys on Hopper, in one launch. A row of the dispatch table.
#pragma once

#include <string>

#include "fa/attention.h"

namespace fa::decode_sm90 {

bool plan(const AttentionParams& params, Plan* plan, std::string* why_not);
size_t max_workspace_bytes(const AttentionParams& largest, const Device& device);
Status launch(const Plan& plan, const AttentionParams& params, const ExecutionContext& context);

}  // namespace fa::decode_sm90
