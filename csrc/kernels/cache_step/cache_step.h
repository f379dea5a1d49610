// SPDX-License-Identifier: Apache-2.0
// What a step of a model does on CUDA before it attends: queries and new keys normalised and rotated, new rows stored into the
// cache, and what the attention kernel can't read (pages, quantized rows) brought into a form that all can. What is left is an
// attention problem without a cache, which any kernel of the table takes. Called by dispatch.cpp.
#pragma once

#include <cstddef>

#include "fa/attention.h"

namespace fa::cache_step {

/// A step, and the memory that it makes beside the caller's tensors.
struct Step {
  StepParams problem;  // what is left to attend: no norm, no rotary embedding, and no cache, or one that has its new rows
  size_t bytes = 0;    // of workspace

  TensorView query;          // [B, H_q, S_q, D] normalised and rotated; absent: the caller's, as it is
  TensorView gathered[2];    // keys, values as float rows; absent: the cache is read where it is. Of pages: packed sequences
  TensorView mask, bias;     // of a windowed cache: their columns are positions, and here rows of the cache
  TensorView kv_lengths;     // int64 [sequences]: rows of the cache that a sequence attends …
  TensorView query_offsets;  // … and where its first query stands among them
  TensorView cu_seqlens_kv;  // int32 [sequences + 1]: of gathered pages
};

/// Is there anything to do before the kernel attends?
inline bool is_needed(const StepParams& params) {
  return params.norm.query_weight.present || params.rotary.cos.present || params.cache.new_key.present;
}

/// All of a step but the values of tensors, which nobody reads here: for plan() with a workspace of null. `reads_cache`: the
/// kernel that attends reads the cache as it is: in pages or written in place, where it finds lengths and positions by its rule,
/// and quantized.
Step prepare(const StepParams& params, void* workspace, bool reads_cache);

/// Enqueues it. One launch; a second one where rows are gathered, where a windowed cache keeps only some of several new ones, or
/// where the past is copied beside rows that transform_rows.h takes.
Status launch(const StepParams& params, const Step& step, const Device& device, const ExecutionContext& context);

}  // namespace fa::cache_step
