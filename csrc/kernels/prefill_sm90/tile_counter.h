// SPDX-License-Identifier: Apache-2.0
// The counter from which the blocks of one launch of prefill_sm90 draw their tiles.
#pragma once

#include <cuda_runtime_api.h>

#include "fa/attention.h"

namespace fa::prefill_sm90 {

inline constexpr size_t kCounterBytes = 256;  // of workspace, an allocation's smallest unit

/// Finds the counter for the next launch in the context's stream, which is 0 when that launch starts, provided that every launch
/// leaves it at 0 (workspace_numbers.h). No launch has to zero its counter first, which would take 2 µs in the stream. When all
/// counters are taken, the counter is the first word of the workspace, and a memset before the launch zeroes it.
cudaError_t find_tile_counter(const ExecutionContext& context, unsigned** counter);

}  // namespace fa::prefill_sm90
