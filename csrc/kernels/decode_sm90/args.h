// SPDX-License-Identifier: Apache-2.0
// What the host hands to the kernel of decode_sm90, and what the producer of a block tells its consumers. Filled by launch.cuh
// and schedule.cuh.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "fa/attention.h"
#include "kernels/common/divisor.h"
#include "kernels/decode_sm90/config.h"
#include "semantics/sequence.h"

namespace fa::decode_sm90 {

/// One counter for each block in which a head begins that other blocks finish.
struct MergeCounter {
  unsigned parts_done;  // wraps to 0 with the last
  unsigned claims;      // of the pieces of the merge; meaningful once all parts are done
};

/// What the schedule must know of a sequence.
struct SequenceWork {
  Sequence sequence;
  int row_tiles;           // of one key head
  int key_begin, key_end;  // keys that lengths, mask and bias leave
  int begin, end;          // key tiles that any row sees
  int units_of_item;       // at least 1: rows without keys are written, too
  int units;               // of all key heads
};

/// How the key tiles of all heads, one head after the other, are cut into one range a block. Units are key tiles; a head without
/// keys counts as one.
struct Schedule {
  int units, blocks;
  int per_block, extra;  // the first `extra` blocks have one more
  int snap;              // a cut at most so far from the end of a head is moved there
};

struct KernelArgs {
  CUtensorMap key;    // [B, H_kv, S_kv, D], boxes of tile_n rows x 64 columns
  CUtensorMap value;  // [B, H_kv, S_kv, D_v], likewise
  AttentionParams problem;
  SequenceRule sequences;
  Divisor group_size;  // query heads of a key head
  int num_spans;       // batch entries, or packed sequences and the rows outside of them
  int tile_rows;       // (row, head) pairs that share a read of the keys: 16, 32 or 64
  int stages;          // of the ring
  int merge_rows;      // rows of a warp that take part in the merge of a block's warps, at most 16
  int partial_rows;    // rows of a slot for partial results
  bool uniform;        // all spans see the same keys, and the host knows which: …
  Schedule schedule;   // … then the schedule is made there, …
  SequenceWork work;   // … and this is that of each span, but for its batch entry
  bool scan_mask;      // the mask is the same for all heads and short beside the keys: each block looks for its true keys
  bool modified;       // softcap, bias or ALiBi: scores need more than a scale
  bool out_by_4;       // four elements of a row of out are an aligned 8 bytes

  // Each block has two slots: 0 for a head that an earlier block began, 1 for one that a later block goes on with.
  float2* partial_state;   // [2 * blocks, partial_rows]: maximum and sum (SoftmaxState)
  float* partial_out;      // [2 * blocks, partial_rows, D_v], relative to that maximum, not normalized
  MergeCounter* counters;  // [blocks], parts_done 0 before the launch and after it
};

/// A piece of work: some rows of one key head, and all or a part of their keys.
struct alignas(16) Item {
  int valid;            // 0: no more
  int sequence, batch;  // batch entry or packed sequence; batch entry
  int key_head;
  int first_row, num_rows;   // (row, head in group) pairs of the sequence
  int row_base;              // the sequence's first row in the tensors
  int query_length;          // rows in use
  int begin, end;            // key tiles
  int full_begin, full_end;  // of them those that all rows see, with nothing to test
  int key_begin, key_end;    // keys that lengths, mask and bias leave
  int test_mask;             // the bool mask hides some of these
  RowBand band;              // what windows leave
  int64_t query_offset;
  int first_block;      // in which the head begins
  int part, num_parts;  // this piece among those of the head, in the order of the keys
  int last_of_block;    // the block has nothing to do afterwards
};

}  // namespace fa::decode_sm90
