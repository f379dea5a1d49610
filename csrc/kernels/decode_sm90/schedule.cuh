// SPDX-License-Identifier: Apache-2.0
// Which block reads which keys. The key tiles of all heads stand in one row, which is cut into equal ranges, so that each block
// reads the same number of bytes whatever the lengths. Every block finds its own range from the lengths on the device; no host
// needs to know them, and launches in a CUDA graph follow them. Called by the kernel's prologue and pieces.cuh.
#pragma once

#include "kernels/common/reduce.cuh"
#include "kernels/decode_sm90/shared_plan.cuh"
#include "kernels/decode_sm90/traits.cuh"

namespace fa::decode_sm90 {

/// Keys that bias and mask have.
FA_HD int64_t most_keys(const KernelArgs& args) {
  const AttentionParams& p = args.problem;
  int64_t keys = args.num_keys;
  if (p.bias.present) keys = min(keys, p.bias.shape[3]);
  if (p.mask.present) keys = min(keys, p.mask.shape[3]);
  return keys;
}

/// Of span `idx`, of whose keys the user's mask leaves `span`. kOnlyLengths: args.only_lengths, and the compiler leaves out the
/// code for all else.
template <class C, bool kOnlyLengths = false>
FA_HD SequenceWork work_of(const KernelArgs& args, int idx, KeyRange span) {
  const AttentionParams& p = args.problem;
  CacheRule rule = args.rule;
  if (rule.mode == CacheMode::kWindow) rule.mode = CacheMode::kAppend;  // never so, which spares the kernel the code for it
  if constexpr (kOnlyLengths) {
    SequenceRule& s = rule.sequences;
    for (IndexView* absent : {&s.query_lengths, &s.query_offsets, &s.cu_seqlens_q, &s.cu_seqlens_kv}) absent->data = nullptr;
    if (rule.mode != CacheMode::kAppend) rule.mode = CacheMode::kWrite;
    s.num_sequences = INT64_MAX;
  }
  SequenceWork work{rule.at(idx).sequence};
  const Sequence& s = work.sequence;
  const int rows = static_cast<int>(s.num_rows) * static_cast<int>(args.group_size.divisor);
  work.row_tiles = (rows + args.tile_rows - 1) >> args.tile_bits;
  const int64_t most = kOnlyLengths ? int64_t{args.num_keys} : most_keys(args);
  work.key_end = static_cast<int>(min(min(s.mask.kv_length, span.end), most));
  work.key_begin = min(static_cast<int>(span.begin), work.key_end);
  const RowBand band = s.mask.band();
  const int begin = band.first(0, work.key_begin), end = band.end(static_cast<int>(s.query_length) - 1, work.key_end);
  if (s.query_length > 0 && begin < end) {
    work.begin = begin / C::kTileN;
    work.end = (end + C::kTileN - 1) / C::kTileN;
  }
  work.units_of_item = max(work.end - work.begin, 1);
  work.units = work.units_of_item * work.row_tiles * static_cast<int>(p.key.shape[1]);
  return work;
}

/// True keys of a row of the mask, of which a lane looks at 16.
struct TrueKeys {
  int begin, end = 0, count = 0;

  __device__ __forceinline__ void add(const uint8_t* row, int64_t stride, bool wide, int first, int num_keys) {
    uint32_t words[4] = {};
    if (wide && first + 16 <= num_keys) {
      const uint4 bytes = *reinterpret_cast<const uint4*>(row + first);
      words[0] = bytes.x, words[1] = bytes.y, words[2] = bytes.z, words[3] = bytes.w;
    } else {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        if (first + i < num_keys && row[(first + i) * stride] != 0) words[i / 4] |= 1u << i % 4 * 8;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t set = __vcmpne4(words[i], 0);
      if (set == 0) continue;
      begin = min(begin, first + 4 * i + (__ffs(set) - 1) / 8);
      end = max(end, first + 4 * i + 4 - __clz(set) / 8);
      count += __popc(set) / 8;
    }
  }
};

/// The whole block: the span of true keys of each batch entry, over all rows of its mask.
template <class C>
__device__ __forceinline__ void scan_masks(const KernelArgs& args, SharedPlan<C::kWarps>& shared) {
  constexpr int kKeysPerWarp = 32 * 16;
  const TensorView& mask = args.problem.mask;
  const int num_keys = static_cast<int>(mask.shape[3]), segments = (num_keys + kKeysPerWarp - 1) / kKeysPerWarp;
  const int rows = mask.shape[2] == 1 || mask.stride[2] == 0 ? 1 : static_cast<int>(mask.shape[2]);
  const int entries = mask.shape[0] == 1 || mask.stride[0] == 0 ? 1 : static_cast<int>(mask.shape[0]);
  for (int i = threadIdx.x; i < entries; i += C::kThreads) shared.mask_span[i] = {num_keys, 0, 0};
  __syncthreads();
  const bool wide = mask.stride[3] == 1 && (reinterpret_cast<uint64_t>(mask.data) | mask.stride[0] | mask.stride[2]) % 16 == 0;
#pragma unroll 2
  for (int i = threadIdx.x / 32; i < entries * rows * segments; i += C::kWarps + 1) {
    const int segment = i % segments, row = i / segments % rows, entry = i / segments / rows;
    const auto* data = static_cast<const uint8_t*>(mask.data) + entry * mask.stride[0] + row * mask.stride[2];
    TrueKeys keys{num_keys};
    keys.add(data, mask.stride[3], wide, segment * kKeysPerWarp + static_cast<int>(threadIdx.x % 32) * 16, num_keys);
    const int begin = __reduce_min_sync(kAllLanes, keys.begin), end = __reduce_max_sync(kAllLanes, keys.end);
    const int count = __reduce_add_sync(kAllLanes, keys.count);
    if (threadIdx.x % 32 == 0 && count > 0) {
      atomicMin(&shared.mask_span[entry].begin, begin);
      atomicMax(&shared.mask_span[entry].end, end);
      atomicAdd(&shared.mask_span[entry].count, count);
    }
  }
  __syncthreads();
}

/// Where the block has looked through the masks: what it found of a span's.
template <class C>
__device__ __forceinline__ const MaskSpan& span_of(const KernelArgs& args, const SharedPlan<C::kWarps>& shared, int idx) {
  const TensorView& mask = args.problem.mask;
  return shared.mask_span[mask.stride[0] == 0 || mask.shape[0] == 1 ? 0 : idx];
}

/// On the device, where lengths and masks are known.
template <class C>
__device__ __forceinline__ SequenceWork work_of(const KernelArgs& args, const SharedPlan<C::kWarps>& shared, int idx) {
  KeyRange keys{0, args.num_keys};
  if (args.scan_mask) {
    const MaskSpan& span = span_of<C>(args, shared, idx);
    keys = {span.begin, span.end};
  }
  return work_of<C>(args, idx, keys);
}

/// Heads that all have equally many key tiles and are cut by args.cut.
struct EqualHeads {
  int tiles;          // 0: they are not so
  int sequence;       // of the block's first piece …
  SequenceWork work;  // … and its work
};

/// A warp, where only the device knows the lengths: are all heads alike? Not asked where anything else than lengths may make
/// spans differ. This takes a third of make_schedule's instructions, and no warp waits for another. All warps must find the same.
template <class C>
__device__ __forceinline__ void find_equal_heads(const KernelArgs& args, EqualHeads& heads) {
  heads.tiles = 0;
  if (!args.only_lengths) return;
  const int last = args.num_spans - 1, rounds = last == 0 ? 0 : last / 32 + 1;  // and one more for the block's own span
  const int first = static_cast<int>(args.cut.heads_of_span.quotient(args.cut.parts.quotient(blockIdx.x)));
  heads.sequence = min(first, last);
  int tiles = 0;
#pragma unroll 1
  for (int i = 0; i <= rounds; ++i) {
    const int idx = i < rounds ? min(32 * i + static_cast<int>(threadIdx.x % 32), last) : heads.sequence;
    heads.work = work_of<C, true>(args, idx, {0, args.num_keys});
    if (i == 0) tiles = __shfl_sync(kAllLanes, heads.work.units_of_item, 0);
    if (!__all_sync(kAllLanes, heads.work.units_of_item == tiles)) return;
  }
  if (args.cut.parts.divisor > 1 || tiles >= args.cut.least_tiles) heads.tiles = tiles;
}

/// Does the mask hide keys within the span of a sequence's keys?
template <class C>
__device__ __forceinline__ bool mask_has_holes(const KernelArgs& args, const SharedPlan<C::kWarps>& shared, int idx) {
  const TensorView& mask = args.problem.mask;
  if (!args.scan_mask) return mask.present;
  const MaskSpan& span = span_of<C>(args, shared, idx);
  const int rows = mask.shape[2] == 1 || mask.stride[2] == 0 ? 1 : static_cast<int>(mask.shape[2]);
  return span.count != rows * max(span.end - span.begin, 0);
}

/// Key tiles of each head of sequence `idx`: -1 where it has not as many tiles of rows as the cut of args takes for granted. 0:
/// these are no rows outside of packed sequences.
__device__ __forceinline__ int tiles_if_alike(const KernelArgs& args, const SequenceWork& work, int idx) {
  if (idx >= args.rule.sequences.num_sequences && work.units == 0) return 0;
  return idx < args.rule.sequences.num_sequences && work.row_tiles == static_cast<int>(args.cut.row_tiles.divisor)
             ? work.units_of_item
             : -1;
}

/// The whole block, once, where lengths or masks decide: cut or schedule, in shared memory. It runs while nothing is read yet,
/// and most of its time instructions are fetched: so what finds a sequence's work is here once.
template <class C>
__device__ __forceinline__ void make_schedule(const KernelArgs& args, SharedPlan<C::kWarps>& shared) {
  if (__builtin_expect(args.scan_mask, 0)) scan_masks<C>(args, shared);
  // 1. Each thread adds up some neighbouring sequences, …
  const int per_thread = (args.num_spans + C::kThreads - 1) / C::kThreads, first = threadIdx.x * per_thread;
  const int last = min(first + per_thread, args.num_spans), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  SequenceWork work;
  int own = 0, tiles = 0;  // tiles of their heads; -1: not of all the same
#pragma unroll 1
  for (int i = first; i < last; ++i) {
    work = work_of<C>(args, shared, i);
    own += work.units;
    const int its = tiles_if_alike(args, work, i);
    tiles = tiles == 0 || its == tiles ? its : its == 0 ? tiles : -1;
  }
  // 2. … and learns the sum of those before them and of all, and whether all are like the first.
  int upto = own;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int below = __shfl_up_sync(kAllLanes, upto, distance);
    if (lane >= distance) upto += below;
  }
  if (lane == 31) shared.warp_units[warp] = upto;
  if (threadIdx.x == 0) shared.first_tiles = tiles;
  __syncthreads();
  const int first_tiles = shared.first_tiles;
  const bool is_long_enough = args.cut.heads > 0 && first_tiles >= args.cut.least_tiles;
  const bool is_cut = __syncthreads_and(is_long_enough && (tiles == 0 || tiles == first_tiles));
  int before = upto - own, units = 0;
#pragma unroll
  for (int i = 0; i <= C::kWarps; ++i) {
    if (i < warp) before += shared.warp_units[i];
    units += shared.warp_units[i];
  }
  // 3. The thread whose sequences have the first unit of the block's first piece says so.
  const Schedule s = cut(units, gridDim.x);
  if (threadIdx.x == 0) {
    shared.schedule = s;
    shared.cut_tiles = is_cut ? first_tiles : 0;
  }
  const int begin = is_cut ? static_cast<int>(args.cut.heads_of_span.quotient(args.cut.parts.quotient(blockIdx.x)))
                           : cut_of(s, blockIdx.x);  // a sequence, or a unit
  if (is_cut ? begin < first || begin >= last : begin < before || begin >= before + own) return;
#pragma unroll 1
  for (int i = first; i < last; ++i) {
    if (per_thread > 1) work = work_of<C>(args, shared, i);
    if (is_cut ? i == begin : begin < before + work.units) {
      shared.first_sequence = i;
      shared.first_unit = before;
      shared.first_work = work;
      return;
    }
    before += work.units;
  }
}

}  // namespace fa::decode_sm90
