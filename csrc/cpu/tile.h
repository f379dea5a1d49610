// SPDX-License-Identifier: Apache-2.0
// What attention_cpu.cpp asks of tile_kernel.cpp, which is compiled once for each instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fa/attention.h"
#include "semantics/cache.h"

namespace fa::cpu {

struct BackwardIsa;  // backward_cpu.h

/// A block of query rows of one sequence: rows first_row … of each of num_heads heads, all of which read kv_head.
struct Task {
  int64_t sequence_idx;
  int64_t kv_head;
  int64_t first_head, num_heads;
  int64_t first_row, num_rows;  // within the sequence; all in use
  int64_t key_begin, key_end;   // only these keys of the sequence
  float* partials = nullptr;  // null: write out. Else [num_splits, num_heads * num_rows, 2 + D_v]: max, sum, unnormalised output
  int64_t num_splits = 1;
};

/// What all tasks of a call share.
struct Tiling {
  const StepParams& params;
  CacheRule steps;
  int64_t rows_per_task;  // num_heads * num_rows of the largest task
  int64_t keys_per_tile;
};

/// One compilation of tile_kernel.cpp.
struct Isa {
  const char* name;
  size_t (*scratch_bytes)(const Tiling& tiling);
  void (*attend)(const Tiling& tiling, const Task& task, void* scratch);  // scratch: 64-byte aligned
  void (*merge)(const Tiling& tiling, const Task& task, void* scratch);   // partials of all splits -> out and lse
  /// The cache step of one sequence and head: past and new rows into params.key (which = 0) or params.value (1).
  void (*store)(const StepParams& params, const CacheRule& steps, int which, int64_t sequence_idx, int64_t head, void* scratch);
  size_t (*store_bytes)(const StepParams& params);  // its scratch
  const BackwardIsa* backward;                      // the same instruction set's
};

/// That of this machine, or the lesser one that FA_CPU_ISA asks for.
const Isa& best_isa();

inline constexpr int64_t kMaxKeysPerTile = 256;

}  // namespace fa::cpu
