// SPDX-License-Identifier: Apache-2.0
// Launches one instantiation of prefill_sm90 on a problem that supports() has accepted.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "fa/attention.h"
#include "kernels/common/kernel_attributes.h"
#include "kernels/common/launch.h"
#include "kernels/common/launch_early.h"
#include "kernels/common/spoilt_rows.h"
#include "kernels/common/tensor_map.h"
#include "kernels/prefill_sm90/instances.h"
#include "kernels/prefill_sm90/kernel.cuh"
#include "kernels/prefill_sm90/shape.h"
#include "kernels/prefill_sm90/tile_counter.h"

namespace fa::prefill_sm90 {

inline constexpr int64_t kL2Budget = 32 << 20;    // bytes of keys and values that the tiles in flight should share
inline constexpr int64_t kKeyHeadsTogether = 16;  // as many as balance tiles of unequal length …
inline constexpr int64_t kKeyHeadsAtTheEnd = 48;  // … and as many as let blocks end together

/// Which tiles run side by side. Rows of unequal length: longest first, as many heads together as balance them and keep their
/// keys and values in L2. Else one head after the other.
inline void choose_order(const AttentionParams& p, int64_t row_tiles, bool unequal, KernelArgs* args) {
  const bool packed = p.cu_seqlens_q.present, batch_fastest = batch_shares_bias(p);
  const int64_t heads = p.query.shape[1];
  const int64_t in_cache = std::max<int64_t>(key_heads_in(kL2Budget, p), 1), heads_per_key_head = heads / p.key.shape[1];
  const int64_t together = std::min(in_cache, kKeyHeadsTogether) * heads_per_key_head;
  args->sort_sequences = p.kv_lengths.present && !packed && args->num_spans > 1 && args->num_spans <= 32;
  args->tiles_end_with_rows = mean_keys(p) > kFewKeys;
  const bool heads_share_bias = p.bias.present && p.bias.stride[1] == 0;
  int64_t group = unequal || heads_share_bias ? together : 1;
  if (batch_fastest) group = std::max<int64_t>(group, args->num_spans);
  const int64_t last_group = unequal ? std::min(in_cache, kKeyHeadsAtTheEnd) * heads_per_key_head : group;
  args->order = TileOrder(packed ? 1 : args->num_spans, heads, row_tiles, group, last_group, batch_fastest);
}

template <class C>
Status encode_maps(const AttentionParams& p, KernelArgs* args) {
  args->bias_by_tile = C::kBiasStages > 0 && bias_has_tiles(p);
  if (args->bias_by_tile) {
    if (Status status = encode_tensor_map(bias_tensor(p.bias), C::kTileM, &args->bias); !status.ok()) return status;
  }
  if (Status status = encode_tensor_map(p.query, query_box_rows<C>(), &args->query); !status.ok()) return status;
  if (Status status = encode_tensor_map(p.key, C::kTileN, &args->key); !status.ok()) return status;
  if (Status status = encode_tensor_map(p.value, C::kTileN, &args->value); !status.ok()) return status;
  return encode_tensor_map(p.out, 64, &args->out);
}

/// All of the arguments but the tensor maps, for tiles of `tile_rows` rows. Returns whether rows see unequally many keys.
inline bool describe_problem(const AttentionParams& p, int64_t tile_rows, KernelArgs* args) {
  const bool packed = p.cu_seqlens_q.present;
  const int64_t heads = p.query.shape[1], spans = num_spans(p), tiles = num_tiles(p, tile_rows);
  args->problem = p;
  args->sequences = sequence_rule(p);
  const bool lengths_differ = p.kv_lengths.present || p.query_lengths.present || packed || p.mask.present;
  args->tiles_alike = !lengths_differ && !p.query_offsets.present && !p.bias.present;
  if (args->tiles_alike) describe_sequence(args->sequences, 0, &args->common);
  args->num_spans = static_cast<int>(spans);
  args->heads_per_kv = Divisor(heads / p.key.shape[1]);
  args->num_tiles = static_cast<int>(tiles);
  const bool unequal = p.window_right >= 0 || p.window_left >= 0 || lengths_differ;
  choose_order(p, tiles / (heads * (packed ? 1 : spans)), unequal, args);
  return unequal;
}

/// Are tiles folded (place_rows)? Where later rows see more keys than earlier ones do, and each block has but one tile.
/// NOTE: modify_scores, which adds ALiBi to scores, takes a tile's rows for neighbours.
template <class C>
bool folds(const AttentionParams& p, const KernelArgs& args, bool one_tile_each) {
  const bool causal = p.window_right >= 0 && p.window_left < 0;
  return C::kFoldedWarpgroups > 1 && causal && one_tile_each && args.tiles_alike && !p.alibi_slopes.present;
}

/// Where blocks note tiles to be mended: behind the tile counter. Null where there are none.
inline SpoiltTile* spoilt_tiles(const AttentionParams& p, const ExecutionContext& context) {
  return may_spoil_rows(p) ? reinterpret_cast<SpoiltTile*>(static_cast<uint8_t*>(context.workspace) + kCounterBytes) : nullptr;
}

template <class C>
Status launch_config(const Plan& plan, const AttentionParams& p, const ExecutionContext& context) {
  KernelArgs args{};
  if (Status status = encode_maps<C>(p, &args); !status.ok()) return status;
  const int64_t tiles = num_tiles(p, C::kTileM);
  if (tiles == 0) return {};
  const bool unequal = describe_problem(p, C::kTileM, &args);
  args.spoilt = spoilt_tiles(p, context);
  const auto stream = static_cast<cudaStream_t>(context.stream);
  const int blocks = static_cast<int>(std::min<int64_t>(tiles, plan.device.num_sms * C::kBlocksPerSm));
  cudaError_t error = cudaSuccess;
  args.folds = folds<C>(p, args, blocks == tiles);
  if (unequal && tiles > blocks) error = find_tile_counter(context, &args.tile_counter);
  const auto kernel = prefill_sm90_kernel<C>;
  constexpr int kSharedBytes = sizeof(SharedPlan<C>);
  static_assert(C::kBlocksPerSm * (kSharedBytes + kReservedShared) <= kSharedOfSm,
                "As many blocks as the registers are planned for must fit into a multiprocessor's shared memory.");
  static_assert(kSharedBytes <= kSharedLimit, "supports() asks the device for kSharedLimit bytes, so no block may need more.");
  if (error == cudaSuccess) error = allow_shared_memory(kernel, kSharedBytes);
  if (error == cudaSuccess) error = launch_early(kernel, blocks, C::kThreads, kSharedBytes, stream, args);
  return cuda_status(error, "prefill_sm90 could not be launched");
}

template <typename T, int kHeadDim, Variant kVariant>
Status launch_instance(const Plan& plan, const AttentionParams& params, const ExecutionContext& context) {
  return launch_config<Traits<T, kHeadDim, kVariant>>(plan, params, context);
}

}  // namespace fa::prefill_sm90
