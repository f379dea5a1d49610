// SPDX-License-Identifier: Apache-2.0
// From a tile index to the rows, head and keys it stands for, and the order in which tiles are dealt out. Run by the producer
// warp.
#pragma once

#include "kernels/common/mask_span.cuh"
#include "kernels/common/packed_search.cuh"
#include "kernels/common/reduce.cuh"
#include "kernels/prefill_sm90/args.h"
#include "semantics/sequence.h"

namespace fa::prefill_sm90 {

/// The keys that the user's mask and bias leave to be seen by any row. For a whole warp.
__device__ __forceinline__ void apply_user_span(const AttentionParams& p, Tile& tile) {
  KeySpan span{0, tile.kv_length};
  if (p.bias.present && p.bias.shape[3] < span.end) span.end = static_cast<int>(p.bias.shape[3]);
  if (p.mask.present && p.mask.shape[3] < span.end) span.end = static_cast<int>(p.mask.shape[3]);
  tile.test_mask = p.mask.present;
  if (p.mask.present && is_alike_for_rows(p.mask)) {
    const uint8_t* row = static_cast<const uint8_t*>(p.mask.data) + tile.batch * p.mask.stride[0] + tile.head * p.mask.stride[1];
    const TrueKeys keys = scan_mask_row<32>(row, p.mask.stride[3], span.end, threadIdx.x % 32).over_warp();
    span = {keys.begin(), keys.end};
    tile.test_mask = keys.has_holes();
  }
  tile.key_begin = span.begin;
  tile.key_end = span.end;
}

/// Which sequences come first: entry i becomes the number of the i-th longest. For a whole warp, and up to 32 sequences.
__device__ __forceinline__ void sort_longest_first(const KernelArgs& args, int (&sequences)[32]) {
  const int lane = threadIdx.x % 32;
  const int length = lane < args.num_spans ? static_cast<int>(args.sequences.at(lane).mask.kv_length) : -1;
  int rank = 0;
#pragma unroll 8
  for (int other = 0; other < 32; ++other) {
    const int its = __shfl_sync(kAllLanes, length, other);
    rank += its > length || (its == length && other < lane);
  }
  sequences[rank] = lane;
  __syncwarp();
}

/// Tile::keys_in_last.
template <class C>
__device__ __forceinline__ int keys_in_last(const Tile& tile, int last_row) {
  const int first_key = (tile.block_end - 1) * C::kTileN;
  const KeySpan all = tile.band.seen_by_all(tile.first_row, last_row, {tile.key_begin, tile.key_end});
  return all.end == tile.key_end && all.begin <= first_key && !tile.test_mask ? tile.key_end - first_key : 0;
}

/// What consumer warpgroup `warpgroup` sees of its tile.
template <class C>
__device__ __forceinline__ RowsView view_rows(const Tile& tile, int warpgroup) {
  const KeySpan keys{tile.key_begin, tile.key_end};
  const int first_row = first_row_of<C::kFoldedWarpgroups>(tile, warpgroup),
            last_row = min(first_row + 63, tile.query_length - 1);
  const KeySpan some = tile.band.seen_by_some(first_row, last_row, keys), touched = tiles_touched(some, C::kTileN);
  const KeySpan full = tiles_inside(tile.band.seen_by_all(first_row, first_row + 63, keys), C::kTileN);
  const bool none = first_row < 0 || first_row > last_row || some.begin >= some.end;
  return {full.begin, tile.test_mask ? 0 : full.end, none ? tile.block_begin : touched.begin,
          none ? tile.block_begin : touched.end};
}

/// Behind the last row of a tile.
template <class C>
__device__ __forceinline__ int end_row(const Tile& tile) {
  if constexpr (C::kFoldedWarpgroups == 1) return tile.first_row + C::kTileM;
  return first_row_of<C::kFoldedWarpgroups>(tile, C::kFoldedWarpgroups - 1) + 64;
}

/// The tile of this index, on top of args.common. kAlike: args.tiles_alike is known. `longest_first`: the order of sequences,
/// where args.sort_sequences. False: no such tile (packed sequences leave some indices unused).
template <class C, bool kAlike = false>
__device__ __forceinline__ bool decode_tile(const KernelArgs& args, int index, const int (&longest_first)[32], Tile& tile) {
  const AttentionParams& p = args.problem;
  const TilePlace place = args.order.at(index);
  const bool packed = !kAlike && !args.tiles_alike && p.cu_seqlens_q.present;
  int sequence = place.sequence, local_tile = args.order.num_row_tiles - 1 - place.tile;
  if (!kAlike && args.sort_sequences) sequence = longest_first[sequence];
  if (__builtin_expect(packed, 0)) {
    const PackedTile found = find_packed_tile<C::kTileM>(args.sequences, args.num_spans, local_tile);
    if (found.sequence < 0) return false;
    sequence = found.sequence;
    local_tile = found.tile;
  }
  tile.valid = 1;
  tile.index = index;
  tile.head = place.head;
  tile.first_row = local_tile * C::kTileM;
  tile.sequence = tile.batch = sequence;
  if (__builtin_expect(!kAlike && !args.tiles_alike, 0)) {
    describe_sequence(args.sequences, sequence, &tile);
    apply_user_span(p, tile);
  }
  if (!kAlike && tile.first_row >= tile.num_rows) return false;
  place_rows<C::kTileM>(local_tile, args.order.num_row_tiles, tile.num_rows, C::kRowsBelowZero && args.tiles_end_with_rows,
                        C::kFoldedWarpgroups > 1 && args.folds, tile);
  tile.block_begin = tile.block_end = tile.keys_in_last = 0;
  if (tile.first_row < tile.query_length) {
    const int last_row = min(end_row<C>(tile), tile.query_length) - 1;
    const KeySpan some = tile.band.seen_by_some(max(tile.first_row, 0), last_row, {tile.key_begin, tile.key_end});
    if (some.begin < some.end) {
      const KeySpan touched = tiles_touched(some, C::kTileN);
      tile.block_begin = touched.begin;
      tile.block_end = touched.end;
      tile.keys_in_last = keys_in_last<C>(tile, last_row);
    }
  }
  return true;
}

/// The index of this block's next tile. For a whole warp.
__device__ __forceinline__ int next_index(const KernelArgs& args, int index) {
  const int blocks = static_cast<int>(gridDim.x);
  if (args.tile_counter == nullptr) {
    // NOTE: each round starts one block further: with a plain stride a block whose count divides that of a head's tiles would
    // always get the same of them, say the short last one.
    return (index + 1) % blocks == 0 ? index + 1 : index + 1 + blocks;
  }
  // NOTE: the blocks draw num_tiles times in all, the last draw of each being one too many: the counter ends at 0 again.
  if (threadIdx.x % 32 == 0) index = blocks + static_cast<int>(atomicInc(args.tile_counter, args.num_tiles - 1));
  return __shfl_sync(kAllLanes, index, 0);
}

}  // namespace fa::prefill_sm90
