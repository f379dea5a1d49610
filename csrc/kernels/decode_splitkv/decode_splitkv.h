// SPDX-License-Identifier: Apache-2.0
// Attention for few query rows against many keys: the keys are split over thread blocks, the query heads of one key head share a
// tile, and combine/ merges the partial results. A row of the dispatch table.
#pragma once

#include <string>

#include "fa/attention.h"

namespace fa::decode_splitkv {

std::string supports(const AttentionParams& params, const DeviceInfo& device);
size_t workspace_bytes(const AttentionParams& params, const DeviceInfo& device);
size_t max_workspace_bytes(const AttentionParams& largest, const DeviceInfo& device);
Status launch(const AttentionParams& params, const ExecutionContext& context);

}  // namespace fa::decode_splitkv
