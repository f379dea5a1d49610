// SPDX-License-Identifier: Apache-2.0
// Gradients of queries, keys and values for mma.sync GPUs (sm_80 and later), after FlashAttention-2's backward pass (Dao 2023): a
// thread block takes tiles of keys one after the other. Their gradients stay in registers while it walks over the tiles of query
// rows that see them, from the last to the first, in all heads of the key head's group. A tile of dQ is summed up in memory, in
// sums of the block's own (query_sums.cuh). Launched by launch.cuh.
#pragma once

#include "kernels/backward_sm80/block.cuh"
#include "kernels/backward_sm80/query_sums.cuh"
#include "kernels/backward_sm80/scores.cuh"

namespace fa::backward_sm80 {

/// Weights of the warp's keys in a tile of rows, and the gradients of its scores, in the element type. `is_whole`: no length or
/// window hides a key of the tile from a row of it.
template <class Config>
__device__ __forceinline__ void weights_of(typename Config::Products::Packed& weights,
                                           typename Config::Products::Packed& d_scores, const Block<Config>& block,
                                           const Step& step, int first_key, bool is_whole) {
  using Products = typename Config::Products;
  constexpr int kKeyBlocks = Products::kKeyBlocks, kRowBlocks = Products::kRowBlocks;
  const int lane = threadIdx.x % 32;
  const uint32_t rows = block.lanes.rows + step.stage * Config::kStage;
  const TileCorner corner{first_key + Config::first_key() + lane / 4,
                          step.row_tile * Config::kTileQ + Config::first_row() + lane % 4 * 2};
  const NumbersOfRows numbers = block.numbers(step.stage);
  typename Products::Scores scores, products;
  Products::multiply(scores, block.lanes.keys, 0, rows, 0, [](int) { return make_float2(0.0f, 0.0f); });
  // The plain sum begins with -D. With few keys (Variant::kModified) what is exact cancels, so D is subtracted from all of it.
  Products::multiply(products, block.lanes.keys, Config::kValue, rows, Config::LayoutQ::kBytes, [&](int n) {
    const float2 delta = Config::kModified ? make_float2(0.0f, 0.0f) : NumbersOfRows::pair(numbers.delta, n);
    return make_float2(-delta.x, -delta.y);
  });
  if constexpr (Config::kModified) {
    typename Products::Scores tanh;
    modify(scores, tanh, block.p, block.work, step.head, corner);
    if (!is_whole) hide(scores, block.work, corner, -INFINITY);
    exponentials<true>(scores, numbers, 0.0f);
    differentiate(scores, products, numbers);
    for_elements<kKeyBlocks, kRowBlocks>(
        corner, [&](int m, int n, int i, int, int) { products[m][n][i] *= 1.0f - tanh[m][n][i] * tanh[m][n][i]; });
  } else {
    exponentials<false>(scores, numbers, block.p.softmax_scale * kLog2E);
    if (!is_whole) hide(scores, block.work, corner, 0.0f);
    for_elements<kKeyBlocks, kRowBlocks>(corner, [&](int m, int n, int i, int, int) { products[m][n][i] *= scores[m][n][i]; });
  }
  Products::pack(weights, scores);
  Products::pack(d_scores, products);
}

/// A thread's part of a tile of dQ.
template <class Config>
__device__ __forceinline__ void write_queries(const typename Config::Products::QuerySums& sums, const Block<Config>& block,
                                              const Step& step) {
  using Products = typename Config::Products;
  using T = typename Config::T;
  const TensorView& d = block.g.d_query;
#pragma unroll
  for (int i = 0; i < Products::kQueryBlocks * 2; ++i) {
    const int row = step.row_tile * Config::kTileQ + Products::query_row() + 8 * i + threadIdx.x % 32 / 4;
    if (row >= block.work.sequence.query_length) continue;
    write_pairs(row_at<T>(d, block.work.sequence.batch_idx, step.head, block.work.sequence.first_row + row),
                Products::query_column(), static_cast<int>(d.shape[3]), block.grid.d_query_by_16, sums[i / 2], i % 2,
                block.p.softmax_scale);
  }
}

/// The keys' part of the gradient of a step's queries: to the sum, or the last with the sum to where it is wanted, if the block
/// has all keys.
template <class Config>
__device__ __forceinline__ void end_queries(const Block<Config>& block, const Walk& walk, const Step& step) {
  using Products = typename Config::Products;
  using Sums = SumsInMemory<Config>;
  const bool is_first = step.row_tile < walk.keys.visited_begin;
  const bool is_last = block.grid.num_splits.divisor == 1 && step.row_tile >= walk.keys.visited_again;
  float* const place = Sums::place(walk.d_query, block.tile_of(step));
  typename Products::QuerySums sums = {};
  if (is_last && !is_first) Sums::load(sums, place);
  Products::accumulate_keys(sums, block.lanes.left_d_scores + Config::place_of_d_scores(step.stage), block.lanes.deep_keys);
  if (is_last) {
    write_queries(sums, block, step);
  } else if (is_first) {
    Sums::store(sums, place);
  } else {
    Sums::add(sums, place);
  }
}

/// Of the gradients of a tile of keys the part of a step's rows, given their weights and the gradients of their scores. The
/// latter also go to shared memory, for the gradient of the queries: calls stored() when they are there, and some products behind
/// them have been issued.
template <class Config, class Stored>
__device__ __forceinline__ void add_to_keys(typename Config::Products::Sums& d_key, typename Config::Products::Sums& d_value,
                                            const typename Config::Products::Packed& weights,
                                            const typename Config::Products::Packed& d_scores, const Block<Config>& block,
                                            int stage, const Stored& stored) {
  using Products = typename Config::Products;
  const uint32_t rows = block.lanes.deep_rows + stage * Config::kStage;
  if (Config::column_group() == 0) Products::store_scores(d_scores, block.lanes.d_scores + Config::place_of_d_scores(stage));
  Products::accumulate(d_value, weights, rows, Config::LayoutQ::kBytes);
  stored();
  Products::accumulate(d_key, d_scores, rows, 0);
}

/// The same where the other warp that has the same keys has the scores of one half of the rows.
template <class Config, class Stored>
__device__ __forceinline__ void add_to_keys_with_other(typename Config::Products::Sums& d_key,
                                                       typename Config::Products::Sums& d_value,
                                                       const typename Config::Products::Packed& weights,
                                                       const typename Config::Products::Packed& d_scores,
                                                       const Block<Config>& block, int stage, const Stored& stored) {
  using Products = typename Config::Products;
  constexpr int kRowBytes = Config::LayoutQ::kBlockBytes, kWeights = Config::kWeights - Config::kScores;
  const uint32_t rows = block.lanes.deep_rows + stage * Config::kStage;
  const uint32_t own = rows + Config::first_row() * kRowBytes, others = rows + (Config::kRows - Config::first_row()) * kRowBytes;
  const uint32_t place = Config::place_of_d_scores(stage);
  Products::store_scores(weights, block.lanes.d_scores + kWeights);
  Products::store_scores(d_scores, block.lanes.d_scores + place);
  Config::tell_other();
  Products::accumulate(d_value, weights, own, Config::LayoutQ::kBytes);
  Products::accumulate(d_key, d_scores, own, 0);
  stored();
  Config::hear_other();
  Products::accumulate_others(d_value, block.lanes.others_scores + kWeights, others, Config::LayoutQ::kBytes);
  Products::accumulate_others(d_key, block.lanes.others_scores + place, others, 0);
}

/// Stores the block's part of the gradients of keys that it shares with another. True: the other's was there before, and has been
/// added.
template <class Config>
__device__ __forceinline__ bool join_parts(typename Config::Products::Sums& d_key, typename Config::Products::Sums& d_value,
                                           const Walk& walk) {
  constexpr int kChunks = sizeof(d_key) / sizeof(float4), kThreads = Config::kThreads;
  float4* const sums[] = {reinterpret_cast<float4*>(d_key), reinterpret_cast<float4*>(d_value)};
  float4* const part = reinterpret_cast<float4*>(walk.part) + threadIdx.x;
#pragma unroll
  for (int i = 0; i < 2 * kChunks; ++i) __stcg(part + i * kThreads, sums[i / kChunks][i % kChunks]);
  __threadfence();
  __syncthreads();
  if (!__syncthreads_or(threadIdx.x == 0 && atomicAdd(walk.arrivals, 1u) == 1)) return false;
  __threadfence();
  const float4* const other = reinterpret_cast<const float4*>(walk.other) + threadIdx.x;
#pragma unroll
  for (int i = 0; i < 2 * kChunks; ++i) {
    float4& sum = sums[i / kChunks][i % kChunks];
    const float4 added = __ldcg(other + i * kThreads);
    sum = make_float4(sum.x + added.x, sum.y + added.y, sum.z + added.z, sum.w + added.w);
  }
  return true;
}

/// Fetches the tiles of keys and values of a walk, and those of its first step.
template <class Config>
__device__ __forceinline__ void begin_walk(const Block<Config>& block, const Walk& walk, const Step& first,
                                           const RowSource<typename Config::T>& source) {
  if (walk.num_steps > 0) {
    block.load_keys(walk.keys.first_key);
    block.load_queries(first, source);
  }
  cp_async_commit();
  block.end_copies(first.stage, true);
  __syncthreads();
  if (block.grid.may_spoil && walk.num_steps > 0) {
    clean_tile<typename Config::T, Config::kThreads>(block.shared, Config::kStages);
    __syncthreads();
  }
}

/// Writes the gradients of a walk's keys when no warp needs the tiles of keys and values any longer.
template <class Config>
__device__ __forceinline__ void end_walk(typename Config::Products::Sums& d_key, typename Config::Products::Sums& d_value,
                                         const Block<Config>& block, const Walk& walk) {
  __syncthreads();
  if (walk.part == nullptr || join_parts<Config>(d_key, d_value, walk)) {
    write_keys<Config>(d_key, block.p.softmax_scale, block.shared, block.g.d_key, block.work, walk.keys.first_key,
                       block.grid.d_key_by_16);
    write_keys<Config>(d_value, 1.0f, block.shared + Config::kValue, block.g.d_value, block.work, walk.keys.first_key,
                       block.grid.d_value_by_16);
  }
  __syncthreads();
}

/// The gradients of a tile of keys, and its part of those of the queries.
template <class Config>
__device__ __forceinline__ void work_off(const Block<Config>& block, const Walk& walk, StepBarriers<Config>& barriers) {
  using Products = typename Config::Products;
  typename Products::Sums d_key = {}, d_value = {};
  Step step{walk.first_head, walk.keys.rows.end - 1, walk.first_stage};
  RowSource<typename Config::T> source = block.source_of(step);
  begin_walk(block, walk, step, source);
  for (int i = 0; i < walk.num_steps; ++i) {
    if (i > 0) {
      const Step before = neighbour(step, walk.keys.rows, 1);
      barriers.ready.wait(before.stage);
      end_queries(block, walk, before);
      barriers.arrive_behind_sums();
      barriers.left.wait(before.stage);
    }
    const bool is_last = i + 1 == walk.num_steps;
    if (!is_last) {
      const Step next = neighbour(step, walk.keys.rows, -1);
      block.advance(source, step, next);
      block.load_queries(next, source);
    }
    cp_async_commit();
    if (block.grid.may_spoil) block.clear_spoilt_rows(step.stage);

    typename Products::Packed weights, d_scores;
    const KeySpan whole = walk.keys.whole_rows;
    weights_of(weights, d_scores, block, step, walk.keys.first_key, step.row_tile >= whole.begin && step.row_tile < whole.end);
    if (i > 0) barriers.wait_for_sums(step.stage ^ 1);
    const auto stored = [&] {
      if (!is_last) block.end_copies(step.stage ^ 1, false);
      barriers.ready.arrive();
    };
    if constexpr (Config::kExchanges) {
      add_to_keys_with_other(d_key, d_value, weights, d_scores, block, step.stage, stored);
    } else {
      add_to_keys(d_key, d_value, weights, d_scores, block, step.stage, stored);
    }
    barriers.left.arrive();
    if (!is_last) step = neighbour(step, walk.keys.rows, -1);
  }
  if (walk.num_steps > 0) {
    barriers.ready.wait(step.stage);
    end_queries(block, walk, step);
    barriers.arrive_behind_sums();
    barriers.wait_for_sums(step.stage);
    barriers.left.wait(step.stage);
  }
  end_walk(d_key, d_value, block, walk);
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kTile.min_blocks)
    backward_tile_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Gradients g,
                         const __grid_constant__ Grid grid) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ TileWork work;
  __shared__ Walk walk;
  __shared__ StepBarriers<Config> barriers;
  if (threadIdx.x == 0) {
    barriers.init();
    walk = {};
  }
  const int num_splits = grid.num_splits.divisor;
  const bool helps = grid.helpers.exist() && blockIdx.x >= grid.helpers.first_block;
  const unsigned own =
      helps ? (blockIdx.x - grid.helpers.first_block) * grid.helpers.pairs_of_one : grid.num_splits.quotient(blockIdx.x);
  const unsigned end = helps ? min(own + grid.helpers.pairs_of_one, grid.helpers.first_block / num_splits) : own + 1;
  const Block<Config> block(p, g, grid, work, shared);
  for (unsigned pair = own; pair < end; ++pair) {
    const unsigned sequence_idx = grid.heads.quotient(pair);
    if (threadIdx.x == 0)
      work = work_of(grid, static_cast<int>(sequence_idx), static_cast<int>(pair - sequence_idx * grid.heads.divisor));
    __syncthreads();
    const int num_tiles = (static_cast<int>(work.sequence.num_keys) + Config::kTileK - 1) / Config::kTileK;
    for (int i = helps ? num_splits - 1 : (num_tiles - 1) / num_splits; i >= 0; --i) {
      const KeySplit keys{helps ? i : static_cast<int>(blockIdx.x - pair * num_splits), num_splits};
      const int of_split = helps ? 0 : i;
      if (keys.tile(of_split) >= num_tiles) continue;
      if (threadIdx.x == 0) walk = walk_of<Config>(grid, work, pair, keys, of_split, helps, walk);
      __syncthreads();
      work_off(block, walk, barriers);
    }
  }
}

/// dQ of a tile of rows as the sum over the splits, the first first, the helper last. Block x has tile x of RowTiles.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    add_splits_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Gradients g,
                      const __grid_constant__ Grid grid) {
  using Sums = SumsInMemory<Config>;
  __shared__ TileWork work;
  const unsigned of_head = static_cast<unsigned>(grid.numbers.tiles.of_head), head = blockIdx.x / of_head;
  const RowPlace place = row_place(grid.numbers.tiles, grid.sequences, head, (blockIdx.x - head * of_head) * Config::kTileQ);
  if (threadIdx.x == 0) work = work_of(grid, place.sequence_idx, 0);
  __syncthreads();
  const Block<Config> block(p, g, grid, work, nullptr);
  const Step step{place.head, static_cast<int>(place.row / Config::kTileQ), 0};
  if (place.row < 0 || place.row >= work.sequence.query_length) return;
  const KeySpan seen = tiles_of_keys(work, step.row_tile, Config::kTileQ, Config::kTileK);
  if (seen.begin >= seen.end) return;
  const int num_splits = grid.num_splits.divisor;
  typename Config::Products::QuerySums total = {}, sums;
  for (int split = 0; split < num_splits + (grid.helpers.exist() ? 1 : 0); ++split) {
    if (!has_sums(work, grid, split, step.row_tile, seen, Config::kTileQ, Config::kTileK)) continue;
    Sums::load(sums, Sums::place(grid.d_query + split * grid.size_of_sums, block.tile_of(step)));
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(sums) / 4); ++i)
      reinterpret_cast<float*>(total)[i] += reinterpret_cast<const float*>(sums)[i];
  }
  write_queries(total, block, step);
}

}  // namespace fa::backward_sm80
