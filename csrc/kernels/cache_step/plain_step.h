// SPDX-License-Identifier: Apache-2.0
// The step that decoders take most, by a kernel of its own: new rows of half precision written in place, as they are or quantized
// to 8 bits, in one piece or in pages, with or without rotary embedding by their own positions. A step is so short that fetching
// code and arguments is most of it: this kernel has a few hundred instructions where that for all steps has 10,264. Used by
// cache_step.cpp.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cache_step/cache_step.h"
#include "kernels/cache_step/row_move.h"
#include "kernels/common/divisor.h"
#include "semantics/cache.h"

namespace fa::cache_step {

/// Rows of one tensor, and what becomes of them.
struct PlainRows : RowMove {
  unsigned groups;          // of four columns, in a row
  unsigned rotated_groups;  // of them; 0: none
};

/// The pages of all sequences, and where new rows go in them.
struct PlainPages {
  IndexView table;  // of the first sequence: page of its row i / rows …
  int64_t sequence_stride;
  Divisor rows;     // … which are those of a page
  int64_t count;    // of all sequences
  IndexView slots;  // of new rows, among those of all pages; data null: by position
};

struct PlainArgs {
  CacheRule rule;
  bool is_paged;
  PlainPages pages;          // meaningless where there are none
  PlainRows moves[3];        // queries, keys, values
  unsigned first_head[3];    // among the heads of all three; those of absent queries are none
  Divisor heads, rows;       // heads of all three; rows of a batch entry, or of all packed sequences
  unsigned count;            // rows of all three
  const void *cos, *sin;     // [angles, 2 * rotated_groups of queries and keys]
  int64_t cos_row, sin_row;  // strides
  int64_t last_angle;        // positions beyond have its angle
  bool interleaved;
  bool bfloat16;                        // else float16
  int64_t *kv_lengths, *query_offsets;  // null: the attention kernel finds them itself
  TensorView scales[2];                 // of keys and values, where those are quantized: float32 [H_kv, D]
  bool float8;                          // quantized: else int8
};

/// The arguments of a step that this kernel can take; false: it can't.
bool make_plain_args(const StepParams& params, const Step& step, PlainArgs* args);

cudaError_t launch_plain(const PlainArgs& args, bool early, cudaStream_t stream);

}  // namespace fa::cache_step
