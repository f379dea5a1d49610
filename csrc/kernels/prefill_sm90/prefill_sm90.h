// SPDX-License-Identifier: Apache-2.0
// The row of the Hopper kernel in the dispatch table: attention by wgmma, TMA and warp specialisation.
#pragma once

#include <cstddef>
#include <string>

#include "fa/attention.h"

namespace fa::prefill_sm90 {

std::string supports(const AttentionParams& params, const DeviceInfo& device);
size_t workspace_bytes(const AttentionParams& params, const DeviceInfo& device);
Status launch(const AttentionParams& params, const ExecutionContext& context);

}  // namespace fa::prefill_sm90
