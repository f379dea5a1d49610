// SPDX-License-Identifier: Apache-2.0
// The CPU row of the dispatch table: tiled, streaming attention (FlashAttention-2's loop), memory linear in the sequence.
#pragma once

#include "dispatch.h"

namespace fa::cpu {

std::string supports(const AttentionParams& params, const DeviceInfo& device);
size_t workspace_bytes(const AttentionParams& params, const DeviceInfo& device);
Status launch(const AttentionParams& params, const ExecutionContext& context);

}  // namespace fa::cpu
