// SPDX-License-Identifier: Apache-2.0
// The counters by which the blocks of one launch of decode_sm90 find out which of them merges a head.
#pragma once

#include <cuda_runtime_api.h>

#include "fa/attention.h"
#include "kernels/decode_sm90/args.h"

namespace fa::decode_sm90 {

inline constexpr int kMaxBlocks = 512;                                    // of a launch
inline constexpr int kNumCounters = kMaxBlocks + 64;                      // number kMaxBlocks counts drawn pieces
inline constexpr size_t kCounterBytes = kNumCounters * sizeof(unsigned);  // of workspace, a multiple of 256

/// Finds kNumCounters counters for the next launch in the context's stream. They are 0 when it starts, provided that every launch
/// leaves them so (workspace_numbers.h). When all are taken, the counters are the beginning of the workspace, and a memset before
/// the launch zeroes them.
cudaError_t find_merge_counters(const ExecutionContext& context, unsigned** counters);

}  // namespace fa::decode_sm90
