// SPDX-License-Identifier: Apache-2.0
// Attention for many query rows on every GPU from Ampere on; also the kernel of last resort there. A row of the dispatch table.
#pragma once

#include <string>

#include "fa/attention.h"

namespace fa::prefill_sm80 {

std::string supports(const AttentionParams& params, const DeviceInfo& device);
size_t workspace_bytes(const AttentionParams& params, const DeviceInfo& device);
Status launch(const AttentionParams& params, const ExecutionContext& context);

}  // namespace fa::prefill_sm80
