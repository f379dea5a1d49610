// SPDX-License-Identifier: Apache-2.0
// Gradients of queries, keys and values for mma.sync GPUs (sm_80 and later), after FlashAttention-2's backward pass (Dao 2023): a
// thread block takes tiles of keys one after the other. Their gradients stay in registers while it walks over the tiles of query
// rows that see them, from the last to the first, in all heads of the key head's group. A tile of dQ is summed up in memory, in
// sums of the block's own (query_sums.cuh). Launched by launch.cuh.
#pragma once

#include <type_traits>

#include "kernels/backward_sm80/config.h"
#include "kernels/backward_sm80/float_products.cuh"
#include "kernels/backward_sm80/products.cuh"
#include "kernels/backward_sm80/query_sums.cuh"
#include "kernels/backward_sm80/scores.cuh"
#include "kernels/backward_sm80/tiles.cuh"

namespace fa::backward_sm80 {

template <class T_, int kHeadDim_, Variant kVariant>
struct TileConfig {
  using T = T_;
  static constexpr int kElementBytes = sizeof(T);
  static constexpr TileShape kTile = tile_shape(kElementBytes, kHeadDim_, kVariant);
  static constexpr bool kModified = kVariant == Variant::kModified, kOneProduct = kVariant == Variant::kTf32;
  static constexpr int kHeadDim = kHeadDim_, kThreads = kTile.threads(), kWarps = kTile.warps, kKeyBlocks = kTile.key_blocks;
  static constexpr int kTileQ = kTile.tile_q, kTileK = kTile.tile_k(), kColumns = kHeadDim / kTile.column_groups();
  static constexpr bool kExchanges = kTile.scores == Scores::kHalf;
  static constexpr int kRows = kExchanges ? kTileQ / 2 : kTileQ;  // of which a warp computes scores
  using LayoutK = TileLayout<kTileK, kHeadDim * kElementBytes, RowOrder::kNeighbours>;
  using LayoutQ = TileLayout<kTileQ, kHeadDim * kElementBytes, RowOrder::kNeighbours>;
  // Gradients of scores: by keys, or in float32, which ldmatrix doesn't transpose, by rows.
  using LayoutS = std::conditional_t<kElementBytes == 2, TileLayout<kTileK, kTileQ * 2, RowOrder::kNeighbours>,
                                     TileLayout<kTileQ, kTileK * 4, RowOrder::kNeighbours>>;
  using CopyK = prefill_sm80::TileCopy<T, LayoutK, kTileK, kThreads>;
  using CopyQ = prefill_sm80::TileCopy<T, LayoutQ, kTileQ, kThreads>;
  using Products =
      std::conditional_t<kElementBytes == 2, backward_sm80::Products<TileConfig>, backward_sm80::FloatProducts<TileConfig>>;

  static constexpr int kKeyWarps = kWarps / kTile.column_groups();
  static __device__ __forceinline__ int first_key() { return threadIdx.x / 32 % kKeyWarps * 16 * kKeyBlocks; }  // of the warp
  static __device__ __forceinline__ int column_group() { return kKeyWarps == kWarps ? 0 : threadIdx.x / 32 / kKeyWarps; }
  static __device__ __forceinline__ int first_row() { return kExchanges ? column_group() * kRows : 0; }  // of the tile
  /// Waits for the other warp that has the same keys.
  static __device__ __forceinline__ void meet_other() {
    asm volatile("bar.sync %0, 64;" ::"r"(1 + threadIdx.x / 32 % kKeyWarps) : "memory");
  }

  // Shared memory: offsets in bytes.
  static constexpr int kValue = LayoutK::kBytes, kStages = 2 * LayoutK::kBytes, kStage = 2 * LayoutQ::kBytes;
  static constexpr int kScores = kStages + 2 * kStage, kWeights = kScores + 2 * LayoutS::kBytes;
  static constexpr int kNumbers = kWeights + (kTile.has_weights ? LayoutS::kBytes : 0), kNumbersOfStage = 3 * 4 * kTileQ;
  static constexpr int kSharedBytes = kNumbers + 2 * kNumbersOfStage;
  static_assert(kSharedBytes == shared_memory_bytes(kElementBytes, kHeadDim, kTile));
};

/// A step of the walk: a tile of rows of a head.
struct Step {
  int head, row_tile;
  int stage;  // of shared memory: two that take turns
};

/// The step behind or, with `by` 1, before another in a walk over the tiles `rows`, from the last to the first, in one head after
/// the other.
__device__ __forceinline__ Step neighbour(const Step& step, KeySpan rows, int by) {
  const int row_tile = step.row_tile + by;
  if (row_tile >= rows.begin && row_tile < rows.end) return {step.head, row_tile, step.stage ^ 1};
  return {step.head - by, by < 0 ? rows.end - 1 : rows.begin, step.stage ^ 1};
}

/// Where a thread copies the rows of a step from: its first chunk of them.
template <class T>
struct RowSource {
  const T *query, *d_out;
};

/// What stays the same for a tile of keys; in shared memory.
struct Walk {
  KeyTile keys;
  int first_head, num_steps;
  float* d_query;      // the sums of the block's split, or of the pair's helper
  float* part;         // null: the block has all rows; else where its part of dK and dV goes …
  const float* other;  // … where the other block's is …
  unsigned* arrivals;  // … and how many of both are there
};

/// With the i-th of a split's tiles of keys, or where the block `helps` its part of the first.
template <class Config>
__device__ __forceinline__ Walk walk_of(const Grid& grid, const TileWork& work, unsigned pair, const KeySplit& split, int i,
                                        bool helps) {
  const KeyTile keys = key_tile_of(work, split, i, grid.helpers, helps, Config::kTileQ, Config::kTileK);
  const int group = grid.group_size.divisor;
  Walk walk{keys,
            work.kv_head * group,
            group * (keys.rows.end - keys.rows.begin),
            grid.d_query + (helps ? split.num_splits : split.split) * grid.size_of_sums,
            nullptr,
            nullptr,
            nullptr};
  if (i == 0 && grid.helpers.row_tiles > 0) {
    constexpr int kPart = 2 * Config::kTileK * Config::kHeadDim;
    const int64_t helped = int64_t{pair} * split.num_splits + split.split;
    float* const parts = grid.helpers.parts + 2 * kPart * helped;
    walk.part = parts + (helps ? kPart : 0);
    walk.other = parts + (helps ? 0 : kPart);
    walk.arrivals = grid.helpers.arrivals + helped;
  }
  return walk;
}

/// What stays the same for a block.
template <class Config>
struct Block {
  using T = typename Config::T;

  const AttentionParams& p;
  const Gradients& g;
  const Grid& grid;
  TileWork& work;  // in shared memory: in registers it would be spilled from the main loop
  unsigned char* shared;
  Lanes lanes;

  __device__ __forceinline__ Block(const AttentionParams& p, const Gradients& g, const Grid& grid, TileWork& work,
                                   unsigned char* shared)
      : p(p), g(g), grid(grid), work(work), shared(shared) {
    lanes = Config::Products::lanes(address(0), address(Config::kStages), address(Config::kScores)).kept();
  }

  __device__ __forceinline__ uint32_t address(int offset) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + offset;
  }
  /// Its number among RowTiles.
  __device__ __forceinline__ int tile_of(const Step& step) const {
    return step.head * static_cast<int>(grid.numbers.tiles.of_head) + work.first_tile + step.row_tile;
  }
  __device__ __forceinline__ RowSource<T> source_of(const Step& step) const {
    using Copy = typename Config::CopyQ;
    const int64_t b = work.sequence.batch_idx, row = work.sequence.first_row + step.row_tile * Config::kTileQ;
    return {source_of_rows<Copy, T>(p.query, b, step.head, row), source_of_rows<Copy, T>(g.d_out, b, step.head, row)};
  }
  /// Where the thread copies the next step's rows from, given where it copied the step's.
  __device__ __forceinline__ void advance(RowSource<T>& source, const Step& step, const Step& next) const {
    if (next.head != step.head) {
      source = source_of(next);
    } else {
      source.query -= Config::kTileQ * p.query.stride[2], source.d_out -= Config::kTileQ * g.d_out.stride[2];
    }
  }
  __device__ __forceinline__ NumbersOfRows numbers(int stage) const {
    const float* first = reinterpret_cast<const float*>(shared + Config::kNumbers + stage * Config::kNumbersOfStage);
    first += Config::first_row() + 2 * (threadIdx.x % 4);
    return {first, first + Config::kTileQ, first + 2 * Config::kTileQ};
  }

  template <class Layout, int kRows>
  __device__ __forceinline__ void load(int tile, const TensorView& view, const T* source, int valid_rows, bool by_16) const {
    load_rows<T, Layout, kRows, Config::kThreads>(shared + tile, view, source, valid_rows, by_16);
  }
  __device__ __forceinline__ void load_keys(int first_key) const {
    using Copy = typename Config::CopyK;
    const int64_t b = work.sequence.batch_idx, row = work.sequence.first_key + first_key;
    const int valid = work.num_keys - first_key;
    const auto load_tile = [&](int tile, const TensorView& view, bool by_16) {
      load<typename Config::LayoutK, Config::kTileK>(tile, view, source_of_rows<Copy, T>(view, b, work.kv_head, row), valid,
                                                     by_16);
    };
    load_tile(0, p.key, grid.key_by_16);
    load_tile(Config::kValue, p.value, grid.value_by_16);
  }
  __device__ __forceinline__ void load_queries(const Step& step, const RowSource<T>& source) const {
    const int valid = static_cast<int>(work.sequence.query_length) - step.row_tile * Config::kTileQ;
    const int tile = Config::kStages + step.stage * Config::kStage;
    load<typename Config::LayoutQ, Config::kTileQ>(tile, p.query, source.query, valid, grid.query_by_16);
    load<typename Config::LayoutQ, Config::kTileQ>(tile + Config::LayoutQ::kBytes, g.d_out, source.d_out, valid,
                                                   grid.d_out_by_16);
    const int64_t entry = int64_t{tile_of(step)} * Config::kTileQ;
    const uint32_t numbers = address(Config::kNumbers + step.stage * Config::kNumbersOfStage);
    load_floats<Config::kTileQ>(numbers, grid.numbers.reference + entry);
    load_floats<Config::kTileQ>(numbers + 4 * Config::kTileQ, grid.numbers.delta + entry);
    if constexpr (Config::kModified) load_floats<Config::kTileQ>(numbers + 8 * Config::kTileQ, grid.numbers.rest + entry);
  }

  /// Tiles in one TF32 product: each element becomes the nearest TF32 number, by the thread that copied it.
  __device__ __forceinline__ void round_keys() const {
    using Copy = typename Config::CopyK;
    round_copied<Copy>(address(0)), round_copied<Copy>(address(Config::kValue));
  }
  __device__ __forceinline__ void round_queries(int stage) const {
    using Copy = typename Config::CopyQ;
    const uint32_t tile = address(Config::kStages + stage * Config::kStage);
    round_copied<Copy>(tile), round_copied<Copy>(tile + Config::LayoutQ::kBytes);
  }

  /// Rows whose weights are NaN for the keys that they see become 0 in shared memory, so that they give nothing to other keys.
  /// Each warp does it for itself.
  __device__ __forceinline__ void clear_spoilt_rows(int stage) const {
    const float* reference = reinterpret_cast<const float*>(shared + Config::kNumbers + stage * Config::kNumbersOfStage);
#pragma unroll
    for (int first = 0; first < Config::kTileQ; first += 32) {
      const int row = first + threadIdx.x % 32;
      unsigned spoilt = __ballot_sync(kAllLanes, row < Config::kTileQ && isnan(reference[row]));
      for (; spoilt != 0; spoilt &= spoilt - 1) {
        unsigned char* tile = shared + Config::kStages + stage * Config::kStage;
        clear_tile_row<typename Config::LayoutQ, Config::kTileQ>(tile, first + __ffs(spoilt) - 1);
        clear_tile_row<typename Config::LayoutQ, Config::kTileQ>(tile + Config::LayoutQ::kBytes, first + __ffs(spoilt) - 1);
        __syncwarp();
      }
    }
  }
};

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
  Products::accumulate_keys(sums, block.lanes.left_d_scores + step.stage * Config::LayoutS::kBytes, block.lanes.deep_keys);
  if (is_last) {
    write_queries(sums, block, step);
  } else if (is_first) {
    Sums::store(sums, place);
  } else {
    Sums::add(sums, place);
  }
}

/// Of the gradients of a tile of keys the part of a step's rows, given their weights and the gradients of their scores. The
/// latter also go to shared memory, for the gradient of the queries.
template <class Config>
__device__ __forceinline__ void add_to_keys(typename Config::Products::Sums& d_key, typename Config::Products::Sums& d_value,
                                            const typename Config::Products::Packed& weights,
                                            const typename Config::Products::Packed& d_scores, const Block<Config>& block,
                                            int stage) {
  using Products = typename Config::Products;
  const uint32_t rows = block.lanes.deep_rows + stage * Config::kStage;
  if (Config::column_group() == 0) Products::store_scores(d_scores, block.lanes.d_scores + stage * Config::LayoutS::kBytes);
  Products::accumulate(d_value, weights, rows, Config::LayoutQ::kBytes);
  Products::accumulate(d_key, d_scores, rows, 0);
}

/// The same where the other warp that has the same keys has the scores of one half of the rows.
template <class Config>
__device__ __forceinline__ void add_to_keys_with_other(typename Config::Products::Sums& d_key,
                                                       typename Config::Products::Sums& d_value,
                                                       const typename Config::Products::Packed& weights,
                                                       const typename Config::Products::Packed& d_scores,
                                                       const Block<Config>& block, int stage) {
  using Products = typename Config::Products;
  constexpr bool kHasWeights = Config::kTile.has_weights;
  constexpr int kRowBytes = Config::LayoutQ::kBlockBytes;
  const uint32_t rows = block.lanes.deep_rows + stage * Config::kStage;
  const uint32_t own = rows + Config::first_row() * kRowBytes, others = rows + (Config::kRows - Config::first_row()) * kRowBytes;
  const uint32_t place_of_d_scores = stage * Config::LayoutS::kBytes;
  const uint32_t place_of_weights = kHasWeights ? Config::kWeights - Config::kScores : place_of_d_scores;
  Products::store_scores(weights, block.lanes.d_scores + place_of_weights);
  if (kHasWeights) Products::store_scores(d_scores, block.lanes.d_scores + place_of_d_scores);
  Products::accumulate(d_value, weights, own, Config::LayoutQ::kBytes);
  Products::accumulate(d_key, d_scores, own, 0);
  Config::meet_other();
  Products::accumulate_others(d_value, block.lanes.others_scores + place_of_weights, others, Config::LayoutQ::kBytes);
  if (!kHasWeights) {
    Config::meet_other();  // both have read the weights
    Products::store_scores(d_scores, block.lanes.d_scores + place_of_d_scores);
    Config::meet_other();
  }
  Products::accumulate_others(d_key, block.lanes.others_scores + place_of_d_scores, others, 0);
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

/// The gradients of a tile of keys, and its part of those of the queries.
template <class Config>
__device__ __forceinline__ void work_off(const Block<Config>& block, const Walk& walk) {
  using Products = typename Config::Products;
  typename Products::Sums d_key = {}, d_value = {};
  Step step{walk.first_head, walk.keys.rows.end - 1, 0};
  RowSource<typename Config::T> source = block.source_of(step);
  if (walk.num_steps > 0) {
    block.load_keys(walk.keys.first_key);
    block.load_queries(step, source);
  }
  cp_async_commit();
  for (int i = 0; i < walk.num_steps; ++i) {
    cp_async_wait<0>();
    if constexpr (Config::kOneProduct) {
      if (!block.grid.copies_by_16()) __syncthreads();  // others have loaded what this thread rounds
      if (i == 0) block.round_keys();
      block.round_queries(step.stage);
    }
    __syncthreads();  // the step's tiles and the gradients of the scores of the step before are there
    if (block.grid.may_spoil && i == 0) {
      clean_tile<typename Config::T, Config::kThreads>(block.shared, Config::kStages);
      __syncthreads();
    }
    if (i + 1 < walk.num_steps) {
      const Step next = neighbour(step, walk.keys.rows, -1);
      block.advance(source, step, next);
      block.load_queries(next, source);
    }
    cp_async_commit();
    if (i > 0) end_queries(block, walk, neighbour(step, walk.keys.rows, 1));
    if (block.grid.may_spoil) block.clear_spoilt_rows(step.stage);

    typename Products::Packed weights, d_scores;
    const KeySpan whole = walk.keys.whole_rows;
    weights_of(weights, d_scores, block, step, walk.keys.first_key, step.row_tile >= whole.begin && step.row_tile < whole.end);
    if constexpr (Config::kExchanges) {
      add_to_keys_with_other(d_key, d_value, weights, d_scores, block, step.stage);
    } else {
      add_to_keys(d_key, d_value, weights, d_scores, block, step.stage);
    }
    if (i + 1 < walk.num_steps) step = neighbour(step, walk.keys.rows, -1);
  }
  cp_async_wait<0>();
  __syncthreads();
  if (walk.num_steps > 0) end_queries(block, walk, step);
  __syncthreads();  // keys and values have been left
  if (walk.part == nullptr || join_parts<Config>(d_key, d_value, walk)) {
    write_keys<Config>(d_key, block.p.softmax_scale, block.shared, block.g.d_key, block.work, walk.keys.first_key,
                       block.grid.d_key_by_16);
    write_keys<Config>(d_value, 1.0f, block.shared + Config::kValue, block.g.d_value, block.work, walk.keys.first_key,
                       block.grid.d_value_by_16);
  }
  __syncthreads();
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kTile.min_blocks)
    backward_tile_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Gradients g,
                         const __grid_constant__ Grid grid) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ TileWork work;
  __shared__ Walk walk;
  const int num_splits = grid.num_splits.divisor;
  const bool helps = grid.helpers.row_tiles > 0 && blockIdx.x >= grid.helpers.first_block;
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
      if (threadIdx.x == 0) walk = walk_of<Config>(grid, work, pair, keys, of_split, helps);
      __syncthreads();
      work_off(block, walk);
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
  for (int split = 0; split < num_splits + (grid.helpers.row_tiles > 0 ? 1 : 0); ++split) {
    if (!has_sums(work, grid, split, step.row_tile, seen, Config::kTileQ, Config::kTileK)) continue;
    Sums::load(sums, Sums::place(grid.d_query + split * grid.size_of_sums, block.tile_of(step)));
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(sums) / 4); ++i)
      reinterpret_cast<float*>(total)[i] += reinterpret_cast<const float*>(sums)[i];
  }
  write_queries(total, block, step);
}

}  // namespace fa::backward_sm80
