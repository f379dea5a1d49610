// SPDX-License-Identifier: Apache-2.0
// Attention for many query rows on every GPU from Ampere on; also the kernel of last resort there. A row of the dispatch table.
#pragma once

#include <string>

#include "fa/attention.h"

namespace fa::prefill_sm80 {

bool plan(const AttentionParams& params, Plan* plan, std::string* why_not);
Status launch(const Plan& plan, const AttentionParams& params, const ExecutionContext& context);

}  // namespace fa::prefill_sm80
