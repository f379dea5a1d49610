// SPDX-License-Identifier: Apache-2.0
// Launches one instantiation of decode_sm90 on a problem that plan() has accepted.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <utility>

#include "kernels/common/kernel_attributes.h"
#include "kernels/common/launch.h"
#include "kernels/common/launch_early.h"
#include "kernels/common/tensor_map.h"
#include "kernels/decode_sm90/head_cut.h"
#include "kernels/decode_sm90/instances.h"
#include "kernels/decode_sm90/kernel.cuh"
#include "kernels/decode_sm90/merge_counters.h"
#include "kernels/decode_sm90/shape.h"

namespace fa::decode_sm90 {

/// Is it worth while, for every block, to look through the masks of all batch entries before it starts? They must be the same for
/// all heads, and short beside what a block reads of keys and values. Looking takes up to a sixth of the time of a cache that is
/// seen whole (1 % with 8 key heads of 128 columns), and leaves out whatever of it is hidden.
inline bool scans_mask(const AttentionParams& p, int blocks) {
  const TensorView& mask = p.mask;
  if (!mask.present || (mask.shape[1] > 1 && mask.stride[1] != 0) || p.query.shape[0] > kMaxScannedMasks) return false;
  const int64_t rows = mask.shape[2] > 1 && mask.stride[2] != 0 ? mask.shape[2] : 1;
  const int64_t bytes_of_key = p.key.shape[1] * (p.key.shape[3] + p.value.shape[3]) * size_of(p.key.dtype);
  return 2 * rows * blocks <= bytes_of_key;
}

/// Are four elements of a row an aligned 8 bytes?
inline bool has_rows_by_4(const TensorView& view) {
  bool aligned = reinterpret_cast<uintptr_t>(view.data) % 8 == 0;
  for (int axis = 0; axis < 3; ++axis) aligned = aligned && (view.shape[axis] == 1 || view.stride[axis] % 4 == 0);
  return aligned;
}

/// How many clusters of `blocks` blocks the current device holds at a time; 0 where it can't say.
template <class C>
int most_clusters(int blocks) {
  return fa::most_clusters(decode_sm90_kernel<C>, blocks, C::kThreads, C::kTile.shared_bytes());
}

/// Where keys and values lie, which are in pages.
inline Pages describe_pages(const StepParams& p, int tile_keys) {
  const TensorView& table = p.cache.block_table;
  Pages pages{};
  pages.table = table.data;
  pages.wide = table.dtype == DType::kInt64;
  pages.sequence_stride = table.shape[0] > 1 ? table.stride[0] : 0;
  pages.page_stride = table.shape[1] > 1 ? table.stride[1] : 0;
  pages.count = static_cast<int>(p.key.shape[0]);
  pages.rows = Divisor(p.key.shape[2]);
  pages.halves = p.key.shape[2] % tile_keys != 0;
  return pages;
}

/// How heads are cut if all are equally long, and the rest of the schedule where the host knows all lengths.
template <class C>
void cut_keys(const StepParams& p, int blocks, KernelArgs* args) {
  const int64_t part_bytes = slot_words(args->partial_rows, p.value.shape[3]) * int64_t{sizeof(float)};
  const int least_tiles = least_tiles_of_part(C::kTileBytes, part_bytes);
  const int64_t rows = p.query.shape[2] * group_size(p);  // of a sequence; of packed ones each is taken to have one tile
  const int64_t row_tiles = p.cu_seqlens_q.present ? 1 : (rows + args->tile_rows - 1) / args->tile_rows;
  const int64_t heads_of_span = row_tiles * p.key.shape[1], heads = heads_of_span * num_sequences(p);
  if (args->uniform && args->num_spans > 0) {
    args->work = work_of<C>(*args, 0, {0, args->num_keys});
    args->share = static_cast<int>(heads * args->work.units_of_item / blocks);
    args->cut = cut_heads(heads, args->work.units_of_item, C::kTileBytes, least_tiles, blocks, most_clusters<C>);
    args->schedule = cut(args->work.units * args->num_spans, blocks);
  } else if (!args->uniform) {
    const int most_tiles = (args->num_keys + C::kTileN - 1) / C::kTileN;
    args->cut = cut_unknown_heads(heads, most_tiles, C::kTileBytes, least_tiles, blocks, most_clusters<C>);
  }
  args->cut.heads_of_span = Divisor(std::max<int64_t>(heads_of_span, 1));
  args->cut.row_tiles = Divisor(std::max<int64_t>(row_tiles, 1));
}

/// Of a block's shared memory.
template <class C>
constexpr int bytes_beside_ring(int merge_rows) {
  return plan_bytes<C::kWarps>() + merge_bytes(C::kHeadDim, merge_rows);
}

/// Are lengths all that tells one sequence from another?
inline bool varies_by_length_only(const StepParams& p) {
  return !in_pages(p) && !p.query_lengths.present && !p.query_offsets.present && !p.cu_seqlens_q.present && !p.mask.present &&
         !p.bias.present;
}

/// Of `stages`, those under way at a time where a block has much to read: enough for `bytes`. The rest is none or at least as
/// many as lanes start side by side, so that no two of these have to do with the same barrier, of which one could come a phase
/// late.
template <class C>
int stages_at_once(int bytes, int stages) {
  const int wanted = (bytes - 1) / C::kTileBytes + 1;
  if (wanted >= stages) return stages;
  return stages > C::kMostTogether ? std::min(wanted, stages - C::kMostTogether) : stages;
}

/// All of the arguments but tensor maps and workspace.
template <class C>
KernelArgs describe_problem(const StepParams& p, int blocks) {
  KernelArgs args{};
  args.problem = p;
  args.rule = cache_rule(p);
  args.num_keys = static_cast<int>(num_keys(p));
  if (in_pages(p)) args.pages = describe_pages(p, C::kTileN);
  args.group_size = Divisor(group_size(p));
  args.num_spans = static_cast<int>(num_spans(p));
  args.tile_rows = tile_rows(p);
  while (1 << args.tile_bits < args.tile_rows) ++args.tile_bits;
  args.read_once = mean_rows(p) * group_size(p) <= args.tile_rows;
  args.merge_rows = merge_rows(p);
  args.partial_rows = most_rows(p);
  args.stages = num_stages(C::kTile, C::kMostStages, C::kStageBytes, bytes_beside_ring<C>(args.merge_rows));
  args.scan_mask = scans_mask(p, blocks);
  args.uniform = p.cache.mode == CacheMode::kAppend && !p.kv_lengths.present && !p.query_lengths.present &&
                 !p.query_offsets.present && !p.cu_seqlens_q.present && !args.scan_mask;
  cut_keys<C>(p, blocks, &args);
  const int at_once = in_pages(p) ? kBytesAtOnceOfPages : args.cut.heads > blocks ? kBytesAtOnceOfDrawn : kBytesAtOnce;
  args.stages_at_once = stages_at_once<C>(at_once, args.stages);
  args.only_lengths = !args.uniform && args.cut.heads > 0 && varies_by_length_only(p);
  args.modified = p.softcap != 0.0f || p.bias.present || p.alibi_slopes.present;
  args.out_by_4 = has_rows_by_4(p.out);
  args.key_scale = p.cache.key_scale;
  args.value_scale = p.cache.value_scale;
  return args;
}

/// Keys and values are read once, so the L2 cache is not to fetch more than is asked for. One box of all columns takes the copy
/// engine less time than one for each 64 of them.
template <class C>
Status encode_keys_and_values(const StepParams& p, KernelArgs* args) {
  const int box_rows = args->pages.halves ? C::kTileN / 2 : C::kTileN;
  args->whole_rows = C::kPanels > 1 && p.key.shape[3] % C::kPanelColumns == 0 && p.value.shape[3] % C::kPanelColumns == 0;
  const int half = C::kPanelBytes / 2;  // of a tile's keys
  args->layout = args->whole_rows && args->pages.halves ? TileLayout{half, C::kPanels * half} : TileLayout{C::kPanelBytes, half};
  const std::pair<const TensorView&, CUtensorMap*> tensors[] = {{p.key, &args->key}, {p.value, &args->value}};
  for (const auto& [tensor, map] : tensors) {
    const Status status = args->whole_rows ? encode_panels_map(tensor, box_rows, C::kPanels, map)
                                           : encode_tensor_map(tensor, box_rows, map, L2Fetch::kLine);
    if (!status.ok()) return status;
  }
  return {};
}

template <typename T, int kHeadDim, Variant kStored>
Status launch_instance(const Plan& plan, const StepParams& p, const ExecutionContext& context) {
  using C = Traits<T, kHeadDim, kStored>;
  constexpr int kSharedBytes = C::kTile.shared_bytes();
  static_assert(bytes_beside_ring<C>(kRowsPerWarp) + kTilesBeforeItem * C::kStageBytes <= kSharedBytes,
                "The ring must hold the tiles that are loaded before their item is published, else nobody would ever empty it.");
  constexpr int kLeastStages = num_stages(C::kTile, C::kMostStages, C::kStageBytes, bytes_beside_ring<C>(kRowsPerWarp));
  static_assert(sizeof(float) * kMostTileRows * PartInShared<C>::kStride <= kLeastStages * C::kStageBytes,
                "The ring must hold a block's part of a head, which a cluster merges there.");
  int blocks = num_blocks(p, plan.device, C::kTile);
  const auto kernel = decode_sm90_kernel<C>;
  cudaError_t error = allow_shared_memory(kernel, kSharedBytes);
  if (error != cudaSuccess) return cuda_status(error, "decode_sm90 could not be launched");
  KernelArgs args = describe_problem<C>(p, blocks);
  if (Status status = encode_keys_and_values<C>(p, &args); !status.ok()) return status;
  const int64_t slots = 2 * blocks;
  args.partial_out = reinterpret_cast<float*>(static_cast<char*>(context.workspace) + kCounterBytes);
  args.partial_state = reinterpret_cast<float2*>(args.partial_out + slots * args.partial_rows * p.value.shape[3]);
  args.marks = reinterpret_cast<unsigned*>(args.partial_state + slots * args.partial_rows);
  const auto stream = static_cast<cudaStream_t>(context.stream);
  error = find_merge_counters(context, &args.counters);
  args.draws = args.counters + kMaxBlocks;
  if (args.uniform && args.cut.heads > 0) {
    blocks = std::min(blocks, args.cut.pieces);
  } else if (args.cut.cluster > 0) {  // whole clusters only, and all of them run at a time: lengths may turn out to differ
    blocks = std::min(blocks / args.cut.cluster, most_clusters<C>(args.cut.cluster)) * args.cut.cluster;
  }
  const int shared_bytes = bytes_beside_ring<C>(args.merge_rows) + args.stages * C::kStageBytes;
  if (error == cudaSuccess)
    error = launch_early(kernel, blocks, C::kThreads, shared_bytes, stream, args, std::max(args.cut.cluster, 1));
  return cuda_status(error, "decode_sm90 could not be launched");
}

}  // namespace fa::decode_sm90
