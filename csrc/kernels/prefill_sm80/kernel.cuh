// SPDX-License-Identifier: Apache-2.0
// The attention kernel for mma.sync GPUs (sm_80 and later), after FlashAttention-2 (Dao 2023): a thread block owns a tile of
// query rows and streams key and value tiles through shared memory, each warp with its own rows from score to output. Launched by
// launch.cuh, for prefill and, with keys split over blocks, for decoding. Needs params that validate() accepts and head sizes
// within the bucket.
#pragma once

#include "kernels/prefill_sm80/config.h"
#include "kernels/prefill_sm80/epilogue.cuh"
#include "kernels/prefill_sm80/key_value_stream.cuh"
#include "kernels/prefill_sm80/mask_span.cuh"
#include "kernels/prefill_sm80/products.cuh"
#include "kernels/prefill_sm80/scores.cuh"
#include "kernels/prefill_sm80/softmax.cuh"
#include "kernels/prefill_sm80/tile_work.cuh"

namespace fa::prefill_sm80 {

template <class T_, int kHeadDim_, Variant kVariant>
struct TileConfig {
  using T = T_;
  static constexpr TileShape kTile = tile_shape(sizeof(T), kHeadDim_, kVariant);
  static constexpr bool kSplit = kVariant == Variant::kSplit, kNatural = kVariant != Variant::kPlain;
  static constexpr bool kOneProduct = kVariant == Variant::kTf32;
  static constexpr int kHeadDim = kHeadDim_, kRowBlocks = kTile.row_blocks, kThreads = kTile.threads(), kSlots = kTile.slots;
  static constexpr int kTileQ = kTile.tile_q(), kTileKv = kTile.tile_kv;
  static constexpr bool kQueryInRegisters = kTile.query_in_registers;
  static constexpr int kColumnGroups = kTile.column_groups, kColumns = kHeadDim_ / kColumnGroups;  // of a warp's output

  /// Of the calling warp.
  static __device__ __forceinline__ int row_warp() { return threadIdx.x / 32 % kTile.row_warps(); }
  static __device__ __forceinline__ int column_group() { return threadIdx.x / 32 / kTile.row_warps(); }
  static constexpr int kSharedBytes = shared_memory_bytes(sizeof(T), kHeadDim, kTile);
  static constexpr int kKeyValueBytes = kSlots * kTileKv * kHeadDim * sizeof(T);  // the query tile lies behind
  using LayoutQ = TileLayout<kTileQ, kHeadDim * sizeof(T), RowOrder::kNeighbours>;
  using LayoutKv = TileLayout<kTileKv, kHeadDim * sizeof(T), RowOrder::kInterleaved>;
  using Products = prefill_sm80::Products<TileConfig>;
};

/// What stays the same for a warp.
template <class Config>
struct WarpContext {
  const AttentionParams& p;
  const TileGrid& grid;
  const TileWork& work;  // in shared memory: in registers it would cost the main loop its occupancy
  int first_row;         // in the tile
  uint32_t query;        // shared-memory address
  uint32_t held[Config::kQueryInRegisters ? Config::Products::kDepthSteps : 1][Config::kRowBlocks][4];
};

/// Scores, softmax and the product with the values for one key tile. kMasked: some of the block's rows may not see all its keys.
template <class Config, bool kMasked>
__device__ __forceinline__ void process_tile(int tile, KeyValueStream<Config>& stream, const WarpContext<Config>& warp,
                                             typename Config::Products::Out& out, RowState<Config::kRowBlocks>& state) {
  using Products = typename Config::Products;
  const int lane = threadIdx.x % 32, first_key = tile * Config::kTileKv, end_key = first_key + Config::kTileKv;
  typename Products::Weights weights;
  BiasFragment<Config::kRowBlocks, Products::kKeyBlocks> bias;
  if constexpr (Config::kNatural) fetch_bias<Config::kSplit>(bias, warp.p, warp.work, warp.grid, warp.first_row, first_key);
  const uint32_t key = stream.template advance<false>(tile);
  bool sees_any = true, sees_all = true;
  if (kMasked && (tile < warp.work.tiles.full_begin || tile >= warp.work.tiles.full_end)) {
    const SeenKeys keys =
        seen_keys<Config::kSplit>(warp.work, warp.grid, warp.first_row, warp.first_row + 16 * Config::kRowBlocks - 1);
    sees_any = first_key < keys.some.end && end_key > keys.some.begin;
    sees_all = first_key >= keys.all.begin && end_key <= keys.all.end;
  }
  if (sees_any) {
    constexpr bool kNatural = Config::kNatural;
    const float to_log2 = kNatural ? kLog2E : warp.p.softmax_scale * kLog2E;
    typename Products::Scores scores;
    Products::scores_of(scores, warp.held, warp.query, key + Products::key_lane(lane));
    if constexpr (kNatural) modify_scores<Config::kSplit>(scores, bias, warp.p, warp.work, warp.grid, warp.first_row, first_key);
    if (!sees_all) hide_keys<Config::kSplit>(scores, warp.work, warp.grid, warp.first_row, first_key);
    move_reference(scores, out, state, to_log2);
    exponentials<typename Config::T, kNatural>(scores, weights, state, to_log2);
  }
  const uint32_t value = stream.template advance<true>(tile);
  if (sees_any) Products::accumulate(out, weights, Products::kFloat ? value : value + Products::value_lane(lane));
}

/// Finds the block's rows and keys, and starts the copies of its first tiles. False where there is nothing to do.
template <class Config>
__device__ __forceinline__ bool start(const AttentionParams& p, const TileGrid& grid, unsigned char* shared,
                                      TileWork& shared_work, KeyValueStream<Config>& stream) {
  TileWork work = find_tile<Config::kTileQ>(p, grid);
  const Sequence& s = work.sequence;
  if (!work.exists || work.first_row >= s.num_rows * (Config::kSplit ? grid.group_size.divisor : 1)) return false;
  load_query_tile<Config>(shared + Config::kKeyValueBytes, p, grid, work);
  work.keys = {0, static_cast<int>(s.mask.kv_length)};
  work.mask_by_element = p.mask.present;
  if constexpr (Config::kNatural && !Config::kSplit) find_mask_span<Config::kThreads>(p, work, shared);
  const SeenKeys keys = seen_keys<Config::kSplit>(work, grid, 0, Config::kTileQ - 1);
  const int kv_head = Config::kSplit ? work.head : grid.group_size.quotient(work.head);
  const int split = Config::kSplit ? blockIdx.y : 0;
  work.tiles = key_tiles(keys, Config::kTileKv, split, grid.num_splits);
  stream.start(s, kv_head, work.tiles.begin, work.tiles.end);
  if (threadIdx.x == 0) shared_work = work;
  return true;
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kTile.min_blocks)
    attention_tile_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ TileGrid grid) {
  using Products = typename Config::Products;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ TileWork work;
  KeyValueStream<Config> stream(p, grid, shared);
  if (!start<Config>(p, grid, shared, work, stream)) return;
  __syncthreads();  // the block's work is there for all warps
  if (p.query_bias.present) add_query_bias<Config>(shared + Config::kKeyValueBytes, p, grid, work);

  const uint32_t query = static_cast<uint32_t>(__cvta_generic_to_shared(shared + Config::kKeyValueBytes));
  WarpContext<Config> warp{p, grid, work, Config::row_warp() * 16 * Config::kRowBlocks,
                           query + Products::query_lane(Config::row_warp(), threadIdx.x % 32)};
  if constexpr (Config::kQueryInRegisters) {
    cp_async_wait<Config::kSlots - 2>();
    __syncthreads();
#pragma unroll
    for (int step = 0; step < Products::kDepthSteps; ++step) Products::load_query(warp.held[step], warp.query, step);
  }
  typename Products::Out out = {};
  RowState<Config::kRowBlocks> state;
  for (int tile = work.tiles.begin; tile < stream.end; ++tile) {
    if (!Config::kNatural && tile >= work.tiles.full_begin && tile < work.tiles.full_end) {
      process_tile<Config, false>(tile, stream, warp, out, state);
    } else {
      process_tile<Config, true>(tile, stream, warp, out, state);
    }
  }
  cp_async_wait<0>();
  __syncthreads();  // without key tiles the query's copies are still under way, and they end in rows of other warps

  const int split = Config::kSplit ? blockIdx.y : 0;
  const bool spoilt = normalize_rows<Config>(out, state, p, grid, work, warp.first_row, split);
  if (Config::kSplit && grid.partial_out != nullptr) {
    write_partial<Config>(out, p, grid, work, warp.first_row, split);
    return;
  }
  write_out<Config>(out, shared + Config::kKeyValueBytes, p, grid, work, warp.first_row);
  if (spoilt) mend_rows<Config>(p, grid, work, warp.first_row);
}

}  // namespace fa::prefill_sm80
