// SPDX-License-Identifier: Apache-2.0
// The row of the Hopper kernel in the dispatch table: attention by wgmma, TMA and warp specialisation.
#pragma once

#include <cstddef>
#include <string>

#include "fa/attention.h"

namespace fa::prefill_sm90 {

/// Can any kernel here that uses the copy engine and wgmma run the problem, but for its dtype and head_dim? As FA_REFUSE_IF says
/// why not.
bool suits_hopper(const AttentionParams& params, const Device& device, std::string* why_not);

/// Workspace for the tile counter and a list of tiles to be mended, here and in prefill_sm90_f32.
size_t workspace_bytes(const AttentionParams& params);

bool plan(const AttentionParams& params, Plan* plan, std::string* why_not);
Status launch(const Plan& plan, const AttentionParams& params, const ExecutionContext& context);

}  // namespace fa::prefill_sm90
