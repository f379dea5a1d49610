// SPDX-License-Identifier: Apache-2.0
// The counter from which the blocks of one launch of prefill_sm90 draw their tiles.
#pragma once

#include <cuda_runtime_api.h>

#include "fa/attention.h"

namespace fa::prefill_sm90 {

inline constexpr size_t kCounterBytes = 256;  // of workspace, an allocation's smallest unit

/// A counter that is 0 when the launch that comes next in the context's stream runs, and that no other launch uses meanwhile, if
/// that launch leaves it 0. It belongs to the workspace, which is nobody else's either: so nothing has to be zeroed before a
/// launch (2 µs of a stream), and replays of a captured launch may run beside anything. Where there are none left it stands in
/// the workspace itself, and is zeroed.
cudaError_t find_tile_counter(const ExecutionContext& context, unsigned** counter);

}  // namespace fa::prefill_sm90
