// SPDX-License-Identifier: Apache-2.0
// Sums over tiles of scores: the gradient of a bias, over the axes that it is broadcast on, and D of each row anew, without the
// rounding of a 16-bit output. A thread block owns a tile of the result: it computes all tiles of scores that belong to it, one
// after the other, adds them element by element, and last adds up rows or keys where the result has one for all. The order is
// always the same. Launched by launch_sums.cuh.
#pragma once

#include "kernels/backward_sm80/kernel.cuh"

namespace fa::backward_sm80 {

/// The gradients of the scores of the step's tile, before softcap's factor, are added to `total`; or where `of_rows`, weights
/// times products, and the weights to `shares`.
template <class Config>
__device__ __forceinline__ void add_tile(typename Config::Products::Scores& total, typename Config::Products::Scores& shares,
                                         const Block<Config>& block, const Step& step, int first_key, bool of_rows) {
  using Products = typename Config::Products;
  const int lane = threadIdx.x % 32;
  const TileCorner corner{first_key + Config::first_key() + lane / 4, step.row_tile * Config::kTileQ + lane % 4 * 2};
  const NumbersOfRows numbers = block.numbers(0);
  typename Products::Scores scores, products, tanh;
  const auto none = [](int) { return make_float2(0.0f, 0.0f); };
  Products::multiply(scores, block.lanes.keys, 0, block.lanes.rows, 0, none);
  modify(scores, tanh, block.p, block.work, step.head, corner);
  hide(scores, block.work, corner, -INFINITY);
  exponentials<true>(scores, numbers, 0.0f);
  Products::multiply(products, block.lanes.keys, Config::kValue, block.lanes.rows, Config::LayoutQ::kBytes, none);
#pragma unroll
  for (int n = 0; n < Products::kRowBlocks; ++n) {
    const float2 delta = of_rows ? make_float2(0.0f, 0.0f) : NumbersOfRows::pair(numbers.delta, n);
#pragma unroll
    for (int m = 0; m < Products::kKeyBlocks; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float weight = scores[m][n][i];
        shares[m][n][i] += weight;
        if (weight != 0.0f) total[m][n][i] = fmaf(weight, products[m][n][i] - (i % 2 == 0 ? delta.x : delta.y), total[m][n][i]);
      }
    }
  }
}

/// The sum over the tile's keys for each of its rows: to `sums`, kTileQ floats of shared memory. `partial`: kTileQ for each warp.
template <class Config>
__device__ __forceinline__ void sum_over_keys(const typename Config::Products::Scores& total, float* sums, float* partial) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int n = 0; n < Config::kTileQ / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = 0.0f;
#pragma unroll
      for (int m = 0; m < Config::kKeyBlocks; ++m) sum += total[m][n][e] + total[m][n][2 + e];
#pragma unroll
      for (int lanes = 16; lanes >= 4; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
      if (lane < 4) partial[warp * Config::kTileQ + 8 * n + 2 * lane + e] = sum;
    }
  }
  __syncthreads();
  if (threadIdx.x < Config::kTileQ) {
    float sum = 0.0f;
    for (int i = 0; i < Config::kKeyWarps; ++i) sum += partial[i * Config::kTileQ + threadIdx.x];
    sums[threadIdx.x] = sum;
  }
  __syncthreads();
}

__device__ __forceinline__ float* sum_at(const TensorView& t, int64_t b, int64_t h, int64_t row, int64_t key) {
  return static_cast<float*>(t.data) + b * t.stride[0] + h * t.stride[1] + row * t.stride[2] + key * t.stride[3];
}

/// Where a block's tile of the result lies.
struct SumPlace {
  int b, head, row_tile, key_tile;
};

/// Of D: block x has tile x of RowTiles. A negative row_tile: it has no rows.
template <class Config>
__device__ __forceinline__ SumPlace place_of_rows(const Grid& grid) {
  const unsigned of_head = static_cast<unsigned>(grid.numbers.tiles.of_head), head = blockIdx.x / of_head;
  const RowPlace place = row_place(grid.numbers.tiles, grid.sequences, head, (blockIdx.x - head * of_head) * Config::kTileQ);
  const bool has_rows = place.row >= 0 && place.row < place.sequence.query_length;
  return {place.sequence_idx, place.head, has_rows ? static_cast<int>(place.row / Config::kTileQ) : -1, 0};
}

__device__ __forceinline__ SumPlace place_of_bias(const ScoreSums& sums) {
  const unsigned of_pair = sums.blocks_of_keys * sums.blocks_of_rows, pair = blockIdx.x / of_pair;
  const unsigned in_pair = blockIdx.x - pair * of_pair, row_tile = in_pair / sums.blocks_of_keys;
  return {static_cast<int>(pair / sums.heads), static_cast<int>(pair % sums.heads), static_cast<int>(row_tile),
          static_cast<int>(in_pair - row_tile * sums.blocks_of_keys)};
}

template <class Config>
__device__ __forceinline__ void write_sums(const typename Config::Products::Scores& total, const ScoreSums& sums,
                                           const SumPlace& place, unsigned char* shared) {
  const TensorView& t = sums.sum;
  const int lane = threadIdx.x % 32, first_row = place.row_tile * Config::kTileQ, first_key = place.key_tile * Config::kTileK;
  if (Config::column_group() == 0 && !sums.shared[3]) {
#pragma unroll
    for (int m = 0; m < Config::kKeyBlocks; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int key = first_key + Config::first_key() + 16 * m + 8 * r + lane / 4;
        float of_key = 0.0f;
#pragma unroll
        for (int n = 0; n < Config::kTileQ / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int row = first_row + 8 * n + lane % 4 * 2 + e;
            of_key += total[m][n][2 * r + e];
            if (!sums.shared[2] && row < t.shape[2] && key < t.shape[3])
              *sum_at(t, place.b, place.head, row, key) = total[m][n][2 * r + e];
          }
        }
        of_key = quad_sum(of_key);
        if (sums.shared[2] && lane % 4 == 0 && key < t.shape[3]) *sum_at(t, place.b, place.head, 0, key) = of_key;
      }
    }
  }
  if (!sums.shared[3]) return;
  float* const of_rows = reinterpret_cast<float*>(shared);
  __syncthreads();
  sum_over_keys<Config>(total, of_rows, of_rows + Config::kTileQ);
  const int row = first_row + static_cast<int>(threadIdx.x);
  if (!sums.shared[2]) {
    if (threadIdx.x < Config::kTileQ && row < t.shape[2]) *sum_at(t, place.b, place.head, row, 0) = of_rows[threadIdx.x];
  } else if (threadIdx.x == 0) {
    float sum = 0.0f;
    for (int i = 0; i < Config::kTileQ; ++i) sum += of_rows[i];
    *sum_at(t, place.b, place.head, 0, 0) = sum;
  }
}

/// D of the tile's rows, less the gradients of their log-sum-exps. Rows with a reference of +inf or NaN keep their 0, and those
/// whose output is of more keys than are here the D that they have. A log-sum-exp that was
/// made of one TF32 product, or of long products summed otherwise, is off by more than the three products here: it is corrected,
/// so that the row's weights add up to 1.
template <class Config>
__device__ __forceinline__ void write_deltas(const typename Config::Products::Scores& total,
                                             const typename Config::Products::Scores& shares, const Block<Config>& block,
                                             const Step& step, unsigned char* shared) {
  const bool is_coarse = Config::kElementBytes == 4 && block.p.float32_precision == Float32Precision::kTf32;
  const float alone = is_coarse ? 1.0f - 0x1p-6f : 1.0f - 0x1p-12f;
  float* const of_rows = reinterpret_cast<float*>(shared);
  float* const weights = of_rows + Config::kTileQ;
  __syncthreads();
  sum_over_keys<Config>(total, of_rows, weights + Config::kTileQ);
  sum_over_keys<Config>(shares, weights, weights + Config::kTileQ);
  const int row = step.row_tile * Config::kTileQ + static_cast<int>(threadIdx.x);
  if (threadIdx.x >= Config::kTileQ || row >= block.work.sequence.query_length) return;
  const int64_t entry = int64_t{block.tile_of(step)} * Config::kTileQ + threadIdx.x;
  const float reference = block.grid.numbers.reference[entry];
  if (isnan(reference) || reference == INFINITY) return;
  float share = weights[threadIdx.x];
  if (block.p.sinks.present) {
    const float sink = static_cast<const float*>(block.p.sinks.data)[step.head * block.p.sinks.stride[0]];
    share += exp2_approx(fmaf(sink - reference, kLog2E, -block.grid.numbers.rest[entry]));
  }
  if (!(share > alone)) return;
  const Sequence& s = block.work.sequence;
  const float d_lse = block.g.d_lse.present ? *row_at<float>(block.g.d_lse, s.batch_idx, step.head, s.first_row + row) : 0.0f;
  block.grid.numbers.delta[entry] = of_rows[threadIdx.x] / share - d_lse;
  if (is_coarse || has_long_products(Config::kElementBytes, Config::kHeadDim)) block.grid.numbers.rest[entry] += log2f(share);
}

/// Adds the tiles of scores of one head of one sequence that belong to the block's tile of the result.
template <class Config>
__device__ __forceinline__ void add_tiles(typename Config::Products::Scores& total, typename Config::Products::Scores& shares,
                                          const Block<Config>& block, Step& step, const ScoreSums& sums, const SumPlace& place) {
  const int all_tiles = (static_cast<int>(block.work.sequence.query_length) + Config::kTileQ - 1) / Config::kTileQ;
  const int first = sums.shared[2] ? 0 : place.row_tile, end = sums.shared[2] ? all_tiles : min(all_tiles, place.row_tile + 1);
  for (step.row_tile = first; step.row_tile < end; ++step.row_tile) {
    KeySpan keys = tiles_of_keys(block.work, step.row_tile, Config::kTileQ, Config::kTileK);
    if (!sums.shared[3]) keys = {max(keys.begin, place.key_tile), min(keys.end, place.key_tile + 1)};
    for (int key_tile = keys.begin; key_tile < keys.end; ++key_tile) {
      __syncthreads();  // the tiles before have been left
      block.load_keys(key_tile * Config::kTileK);
      block.load_queries(step, block.source_of(step));
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();
      add_tile(total, shares, block, step, key_tile * Config::kTileK, sums.of_rows);
    }
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kTile.min_blocks)
    score_sums_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Gradients g,
                      const __grid_constant__ Grid grid, const __grid_constant__ ScoreSums sums) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ TileWork work;
  const SumPlace place = sums.of_rows ? place_of_rows<Config>(grid) : place_of_bias(sums);
  if (place.row_tile < 0) return;
  const Block<Config> block(p, g, grid, work, shared);
  typename Config::Products::Scores total = {}, shares = {};
  Step step{};
  const int sequences = static_cast<int>(grid.sequences.num_sequences), heads = static_cast<int>(p.query.shape[1]);
  const int group = grid.group_size.divisor;
  for (int b = place.b; b < (sums.shared[0] ? sequences : place.b + 1); ++b) {
    for (step.head = place.head; step.head < (sums.shared[1] ? heads : place.head + 1); ++step.head) {
      __syncthreads();  // all have left the head before
      if (threadIdx.x == 0) work = work_of(grid, b, step.head / group);
      __syncthreads();
      add_tiles(total, shares, block, step, sums, place);
    }
  }
  step = {place.head, place.row_tile, 0};
  if (sums.of_rows) {
    write_deltas(total, shares, block, step, shared);
  } else {
    write_sums<Config>(total, sums, place, shared);
  }
}

}  // namespace fa::backward_sm80
