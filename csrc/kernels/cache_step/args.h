// SPDX-License-Identifier: Apache-2.0
// What the host hands to the kernels of cache_step. Filled by cache_step.cpp.
#pragma once

#include <cuda_runtime.h>

#include "semantics/cache.h"

namespace fa::cache_step {

inline constexpr int kThreads = 256, kWarps = kThreads / 32;
inline constexpr int kChunkRows = 64;      // rows of a cache that a block copies
inline constexpr int kMostTileKeys = 512;  // no attention kernel has longer tiles of keys; prefill_sm90_wide has such

/// What is moved as it is goes in units of 16, 4, 2 or 1 bytes: those that all rows are aligned to.
struct Units {
  int past, fresh;   // from the past, from the new rows to the cache
  int present;       // from a window's own memory to what remains
  int gathered;      // from pages
  bool gather_by_8;  // quantized rows: eight columns at once
};

struct Args {
  StepParams p;
  CacheRule rule;
  TensorView query, gathered[2], mask, bias;  // as in Step
  int64_t *kv_lengths, *query_offsets;
  int32_t* cu_seqlens_kv;
  Units units[2];      // keys, values
  int element_bytes;   // of queries and new rows
  int cache_bytes[2];  // of an element of the cache
  int bias_bytes;

  // The blocks of the first launch, one kind after the other.
  unsigned query_blocks, new_blocks, past_blocks, window_blocks, mask_blocks, length_blocks;
  // Of the second.
  unsigned gather_blocks, keep_blocks;
  unsigned chunks;  // of a head's cache, kChunkRows each

  unsigned store_blocks() const { return query_blocks + new_blocks + past_blocks + window_blocks + mask_blocks + length_blocks; }
  unsigned finish_blocks() const { return gather_blocks + keep_blocks; }
};

/// Enqueue the kernels. `early`: by programmatic dependent launch, which needs code for compute capability 9.0.
cudaError_t launch_store(const Args& args, bool early, cudaStream_t stream);
cudaError_t launch_finish(const Args& args, bool early, cudaStream_t stream);

}  // namespace fa::cache_step
