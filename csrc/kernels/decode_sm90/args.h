// SPDX-License-Identifier: Apache-2.0
// What the host hands to the kernel of decode_sm90, and what the producer of a block tells its consumers. Filled by launch.cuh
// and schedule.cuh.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "fa/attention.h"
#include "kernels/common/divisor.h"
#include "kernels/decode_sm90/ranges.h"
#include "semantics/cache.h"

namespace fa::decode_sm90 {

/// What the schedule must know of a sequence.
struct SequenceWork {
  Sequence sequence;
  int row_tiles;           // of one key head
  int key_begin, key_end;  // keys that lengths, mask and bias leave
  int begin, end;          // key tiles that any row sees
  int units_of_item;       // at least 1: rows without keys are written, too
  int units;               // of all key heads
};

/// How heads that all have equally many key tiles are cut into pieces.
struct HeadCut {
  int heads;        // 0: they are not cut so, but by a Schedule
  int tiles;        // of each; where only the device knows them, at most
  int least_tiles;  // where only the device knows the tiles: with fewer, heads are not cut so
  Divisor parts;    // of each
  int pieces;       // of all
  int cluster;      // blocks that have the parts of a head and merge them through shared memory; 0: through the workspace
  Divisor heads_of_span, row_tiles;  // of a span: tiles of rows of all key heads, and of one
};

/// Where a tile's keys, and its values, lie in a stage: bytes from a panel of columns to the next, and from 16 keys to the next.
struct TileLayout {
  int panel, half;
};

/// Keys and values in pages: row i of a sequence is row i % rows of page table[sequence, i / rows], which is entry [page, head,
/// row] of the tensors. A page that does not exist reads as zeros.
struct Pages {
  const void* table;  // null: keys and values are not in pages
  bool wide;          // int64, else int32
  int64_t sequence_stride, page_stride;
  Divisor rows;  // of a page
  int count;     // of all sequences
  bool halves;   // boxes have 16 rows, half a key tile; else 32, and a page has whole tiles
};

struct KernelArgs {
  CUtensorMap key;    // [B, H_kv, S_kv, D] or pages, boxes of tile_n rows (pages: see there) x 64 columns, or of all columns
  CUtensorMap value;  // [B, H_kv, S_kv, D_v], likewise
  bool whole_rows;    // boxes have all columns
  bool read_once;     // no two tiles of rows have the same keys
  TileLayout layout;  // of a stage
  AttentionParams problem;
  CacheRule rule;  // of a problem without a cache, a SequenceRule
  Pages pages;
  int num_keys;        // rows of a sequence's cache at most
  Divisor group_size;  // query heads of a key head
  int num_spans;       // batch entries, or packed sequences and the rows outside of them
  int tile_rows;       // (row, head) pairs that share a read of the keys: 16, 32 or 64 …
  int tile_bits;       // … and its logarithm
  int stages;          // of the ring …
  int stages_at_once;  // … and those under way at a time, if the block has much to read
  int merge_rows;      // rows of a warp that take part in the merge of a block's warps, at most 16
  int partial_rows;    // rows of a slot for partial results
  bool uniform;        // all spans see the same keys, and the host knows which: …
  Schedule schedule;   // … then the schedule is made there, …
  SequenceWork work;   // … and this is that of each span, but for its batch entry
  int share;           // … and so are the key tiles of a block, on average
  HeadCut cut;         // or all heads are cut alike, and the schedule is not used; not uniform: if they turn out to be so
  unsigned* draws;     // pieces of a cut that were drawn beyond the first of each block, 0 before the launch and after it
  bool scan_mask;      // the mask is the same for all heads and short beside the keys: each block looks for its true keys
  bool only_lengths;   // not uniform: nothing but lengths and positions makes spans differ, and heads may be cut alike
  bool modified;       // softcap, bias or ALiBi: scores need more than a scale
  bool out_by_4;       // four elements of a row of out are an aligned 8 bytes

  // Of a HeadCut, each piece has a slot; of a Schedule each block two: 0 for a head that an earlier block began, 1 for one that a
  // later block goes on with.
  float2* partial_state;  // [slots, partial_rows]: maximum and sum (SoftmaxState)
  float* partial_out;     // [slots, partial_rows, D_v], relative to that maximum, not normalized
  unsigned* marks;        // [slots, kMostWarps]: not 0 where the slot's warp has taken its pieces of the merge, or another has
  unsigned* counters;     // of parts that are done, one for each head that several blocks share; 0 before the launch and after

  TensorView key_scale, value_scale;  // of a quantized cache: float32 [H_kv, D], see CacheParams
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
  int first_warp;                        // which has the first tile
  int part, num_parts;                   // this piece among those of the head, in the order of the keys
  int counter;                           // of the head
  int first_slot, late_slot, slot_step;  // part 0 has first_slot, part i late_slot + slot_step * i
  int in_cluster;                        // the head's parts are those of a cluster, and the slots unused
  int last_of_block;                     // the block has nothing to do afterwards
};

}  // namespace fa::decode_sm90
