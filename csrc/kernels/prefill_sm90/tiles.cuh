// SPDX-License-Identifier: Apache-2.0
// From a tile index to the rows, head and keys it stands for, and the order in which tiles are dealt out. Run by the producer
// warp.
#pragma once

#include "kernels/common/reduce.cuh"
#include "kernels/prefill_sm90/args.h"
#include "semantics/sequence.h"

namespace fa::prefill_sm90 {

/// Packed sequences: which sequence row tile `row_tile` belongs to, and its number there. False: beyond the last.
template <class C>
__device__ __forceinline__ bool find_sequence(const KernelArgs& args, int row_tile, int* sequence, int* local_tile) {
  const int lane = threadIdx.x % 32;
  for (int first = 0; first < args.num_spans; first += 32) {
    int tiles = 0;
    if (first + lane < args.num_spans)
      tiles = static_cast<int>((args.sequences.at(first + lane).num_rows + C::kTileM - 1) / C::kTileM);
    int upto = tiles;  // inclusive prefix sum over lanes
    for (int distance = 1; distance < 32; distance *= 2) {
      const int below = __shfl_up_sync(kAllLanes, upto, distance);
      if (lane >= distance) upto += below;
    }
    const unsigned owners = __ballot_sync(kAllLanes, row_tile < upto);
    if (owners != 0) {
      const int owner = __ffs(owners) - 1;
      *sequence = first + owner;
      *local_tile = row_tile - __shfl_sync(kAllLanes, upto - tiles, owner);
      return true;
    }
    row_tile -= __shfl_sync(kAllLanes, upto, 31);
  }
  return false;
}

/// True keys seen so far: the first, one past the last, how many.
struct TrueKeys {
  int first, end = 0, count = 0;

  /// Four mask bytes, the lowest for `key`.
  __device__ __forceinline__ void add4(uint32_t bytes, int key) {
    const uint32_t set = __vcmpne4(bytes, 0);
    if (set == 0) return;
    first = min(first, key + (__ffs(set) - 1) / 8);
    end = max(end, key + 4 - __clz(set) / 8);
    count += __popc(set) / 8;
  }
};

/// A mask that is the same for all rows of a head (padding as a bool [B, 1, 1, S_kv]): the span of its true keys. Where these are
/// all neighbours the span says all, else *test_mask remains set.
__device__ __forceinline__ KeyRange row_mask_span(const TensorView& mask, int64_t offset, int num_keys, int* test_mask) {
  const auto* data = static_cast<const uint8_t*>(mask.data) + offset;
  TrueKeys keys{num_keys};
  const bool wide = mask.stride[3] == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  const int num_wide = wide ? num_keys / 16 * 16 : 0;
#pragma unroll 4
  for (int key = threadIdx.x % 32 * 16; key < num_wide; key += 32 * 16) {
    const uint4 bytes = *reinterpret_cast<const uint4*>(data + key);
    keys.add4(bytes.x, key);
    keys.add4(bytes.y, key + 4);
    keys.add4(bytes.z, key + 8);
    keys.add4(bytes.w, key + 12);
  }
  for (int key = num_wide + threadIdx.x % 32; key < num_keys; key += 32) keys.add4(data[key * mask.stride[3]], key);
  const int first = __reduce_min_sync(kAllLanes, keys.first), end = __reduce_max_sync(kAllLanes, keys.end);
  *test_mask = __reduce_add_sync(kAllLanes, keys.count) != end - first;
  return {first, end > first ? end : first};
}

/// The keys that the user's mask and bias leave to be seen by any row.
__device__ __forceinline__ void apply_user_span(const AttentionParams& p, Tile& tile) {
  KeyRange span{0, tile.kv_length};
  if (p.bias.present && p.bias.shape[3] < span.end) span.end = p.bias.shape[3];
  if (p.mask.present && p.mask.shape[3] < span.end) span.end = p.mask.shape[3];
  tile.test_mask = p.mask.present;
  if (p.mask.present && (p.mask.shape[2] == 1 || p.mask.stride[2] == 0)) {
    const int64_t offset = tile.batch * p.mask.stride[0] + tile.head * p.mask.stride[1];
    span = row_mask_span(p.mask, offset, static_cast<int>(span.end), &tile.test_mask);
  }
  tile.key_begin = static_cast<int>(span.begin);
  tile.key_end = static_cast<int>(span.end);
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
  const bool alike = tile.band.end(tile.first_row, tile.key_end) == tile.key_end &&
                     tile.band.first(last_row, tile.key_begin) <= first_key && !tile.test_mask;
  return alike ? tile.key_end - first_key : 0;
}

/// What consumer warpgroup `warpgroup` sees of its tile.
template <class C>
__device__ __forceinline__ RowsView view_rows(const Tile& tile, int warpgroup) {
  const int first_row = tile.first_row + warpgroup * 64, last_row = min(first_row + 63, tile.query_length - 1);
  const int begin = tile.band.first(first_row, tile.key_begin), end = tile.band.end(last_row, tile.key_end);
  const bool none = first_row < 0 || first_row > last_row || begin >= end;
  return {(tile.band.first(first_row + 63, tile.key_begin) + C::kTileN - 1) / C::kTileN,
          tile.test_mask ? 0 : tile.band.end(first_row, tile.key_end) / C::kTileN, none ? tile.block_begin : begin / C::kTileN,
          none ? tile.block_begin : (end + C::kTileN - 1) / C::kTileN};
}

/// The tile of this index, on top of args.common. `longest_first`: the order of sequences, where args.sort_sequences. False: no
/// such tile (packed sequences leave some indices unused).
template <class C>
__device__ __forceinline__ bool decode_tile(const KernelArgs& args, int index, const int (&longest_first)[32], Tile& tile) {
  const AttentionParams& p = args.problem;
  const TilePlace place = args.order.at(index);
  const bool packed = !args.tiles_alike && p.cu_seqlens_q.present;
  int sequence = place.sequence, local_tile = args.order.num_row_tiles - 1 - place.tile;
  if (args.sort_sequences) sequence = longest_first[sequence];
  if (__builtin_expect(packed, 0) && !find_sequence<C>(args, local_tile, &sequence, &local_tile)) return false;
  tile.valid = 1;
  tile.head = place.head;
  tile.first_row = local_tile * C::kTileM;
  tile.sequence = tile.batch = sequence;
  if (__builtin_expect(!args.tiles_alike, 0)) {
    describe_sequence(args.sequences, sequence, &tile);
    apply_user_span(p, tile);
  }
  if (tile.first_row >= tile.num_rows) return false;
  if (C::kRowsBelowZero && args.tiles_end_with_rows)
    tile.first_row -= (C::kTileM - 1 - (tile.num_rows - 1) % C::kTileM) / 64 * 64;
  tile.block_begin = tile.block_end = tile.keys_in_last = 0;
  if (tile.first_row < tile.query_length) {
    const int last_row = min(tile.first_row + C::kTileM, tile.query_length) - 1;
    const int begin = tile.band.first(max(tile.first_row, 0), tile.key_begin), end = tile.band.end(last_row, tile.key_end);
    if (begin < end) {
      tile.block_begin = begin / C::kTileN;
      tile.block_end = (end + C::kTileN - 1) / C::kTileN;
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
