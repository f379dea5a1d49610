// SPDX-License-Identifier: Apache-2.0
// From a tile index to the rows, head and keys it stands for, and the order in which tiles are dealt out. Run by the producer
// warp.
#pragma once

#include "kernels/common/reduce.cuh"
#include "kernels/prefill_sm90/args.h"
#include "kernels/prefill_sm90/config.cuh"
#include "semantics/sequence.h"

namespace fa::prefill_sm90 {

/// What the consumers need to know of sequence `idx`.
__device__ __forceinline__ MaskRule describe_sequence(const SequenceRule& rule, int idx, Tile& tile) {
  const Sequence s = rule.at(idx);
  tile.sequence = idx;
  tile.batch = static_cast<int>(s.batch_idx);
  tile.row_base = static_cast<int>(s.first_row);
  tile.key_base = static_cast<int>(s.first_key);
  tile.num_rows = static_cast<int>(s.num_rows);
  tile.num_keys = static_cast<int>(s.num_keys);
  tile.query_length = static_cast<int>(s.query_length);
  tile.kv_length = static_cast<int>(s.mask.kv_length);
  tile.query_offset = s.mask.query_offset;
  return s.mask;
}

/// Packed sequences: which sequence row tile `row_tile` belongs to, and its number there. False: beyond the last.
template <class C>
__device__ __forceinline__ bool find_sequence(const KernelArgs& args, int row_tile, int* sequence, int* local_tile) {
  const int lane = threadIdx.x % 32;
  for (int first = 0; first < args.num_sequences; first += 32) {
    int tiles = 0;
    if (first + lane < args.num_sequences)
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

/// A mask that is the same for all rows of a head (padding as a bool [B, 1, 1, S_kv]): the span of its true keys. Where these are
/// all neighbours the span says all, else *test_mask remains set.
__device__ __forceinline__ KeyRange row_mask_span(const TensorView& mask, int64_t offset, int num_keys, int* test_mask) {
  const auto* data = static_cast<const uint8_t*>(mask.data) + offset;
  int first = num_keys, end = 0, count = 0;
  for (int key = threadIdx.x % 32; key < num_keys; key += 32) {
    if (data[key * mask.stride[3]] == 0) continue;
    first = min(first, key);
    end = key + 1;
    ++count;
  }
  first = __reduce_min_sync(kAllLanes, first);
  end = __reduce_max_sync(kAllLanes, end);
  *test_mask = __reduce_add_sync(kAllLanes, count) != end - first;
  return {first, end > first ? end : first};
}

/// The keys that the user's mask and bias leave to be seen by any row.
__device__ __forceinline__ KeyRange user_span(const AttentionParams& p, Tile& tile) {
  KeyRange span{0, tile.kv_length};
  if (p.bias.present && p.bias.shape[3] < span.end) span.end = p.bias.shape[3];
  if (p.mask.present && p.mask.shape[3] < span.end) span.end = p.mask.shape[3];
  tile.test_mask = p.mask.present;
  if (p.mask.present && (p.mask.shape[2] == 1 || p.mask.stride[2] == 0)) {
    const int64_t offset = tile.batch * p.mask.stride[0] + tile.head * p.mask.stride[1];
    span = row_mask_span(p.mask, offset, static_cast<int>(span.end), &tile.test_mask);
  }
  return span;
}

/// Tiles go by groups of heads_per_group (sequence, head) pairs; in a group the last rows, which causal masks make longest,
/// first. False: no such tile (packed sequences leave some indices unused).
template <class C>
__device__ __forceinline__ bool decode_tile(const KernelArgs& args, int index, Tile& tile) {
  const AttentionParams& p = args.problem;
  const int num_heads = static_cast<int>(p.query.shape[1]);
  const bool packed = p.cu_seqlens_q.present;
  const int num_pairs = packed ? num_heads : num_heads * args.num_sequences;
  const int group_tiles = args.heads_per_group * args.num_row_tiles;
  const int group = index / group_tiles;
  const int first_pair = group * args.heads_per_group;
  const int pairs = min(args.heads_per_group, num_pairs - first_pair);
  const int in_group = index - group * group_tiles;
  const int row_tile = args.num_row_tiles - 1 - in_group / pairs;
  const int pair = first_pair + in_group % pairs;
  const bool batch_fastest = !packed && args.batch_fastest;
  tile.head = batch_fastest ? pair / args.num_sequences : pair % num_heads;
  int sequence = batch_fastest ? pair % args.num_sequences : pair / num_heads, local_tile = row_tile;
  if (packed && !find_sequence<C>(args, row_tile, &sequence, &local_tile)) return false;
  tile.first_row = local_tile * C::kTileM;
  const MaskRule rule = describe_sequence(args.sequences, sequence, tile);
  if (tile.first_row >= tile.num_rows) return false;
  KeyRange span{0, tile.kv_length};
  if constexpr (C::kModified) span = user_span(p, tile);
  tile.key_begin = static_cast<int>(span.begin);
  tile.key_end = static_cast<int>(span.end);
  tile.block_begin = tile.block_end = 0;
  if (tile.first_row < tile.query_length) {
    const KeyRange keys = rule.key_range(tile.first_row, min(tile.first_row + C::kTileM, tile.query_length) - 1);
    const int begin = max(static_cast<int>(keys.begin), tile.key_begin), end = min(static_cast<int>(keys.end), tile.key_end);
    if (begin < end) {
      tile.block_begin = begin / C::kTileN;
      tile.block_end = (end + C::kTileN - 1) / C::kTileN;
    }
  }
  return true;
}

/// The next tile of this block. False: none is left.
template <class C>
__device__ __forceinline__ bool next_tile(const KernelArgs& args, int& index, Tile& tile) {
  for (;;) {
    if (args.tile_counter != nullptr) {
      if (threadIdx.x % 32 == 0) index = atomicAdd(args.tile_counter, 1);
      index = __shfl_sync(kAllLanes, index, 0);
    } else {
      index = index < 0 ? static_cast<int>(blockIdx.x) : index + static_cast<int>(gridDim.x);
    }
    if (index >= args.num_tiles) return false;
    if (decode_tile<C>(args, index, tile)) return true;
  }
}

}  // namespace fa::prefill_sm90
