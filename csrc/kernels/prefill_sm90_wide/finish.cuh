// SPDX-License-Identifier: Apache-2.0
// The end of a tile in prefill_sm90_wide: the sums of all warpgroups that have its rows, and the output's way to device memory.
#pragma once

#include "kernels/common/hidden_values.cuh"
#include "kernels/common/tma.cuh"
#include "kernels/prefill_sm90_wide/consumer.cuh"

namespace fa::prefill_sm90_wide {

/// Once the warpgroup's columns first_column … + num_columns - 1 are in device memory, mends those of its rows that hold values
/// of hidden keys, where `spoilt` is true in any lane of a warp.
template <class C>
__device__ __forceinline__ void mend_columns(const Consumer<C>& consumer, int first_column, int num_columns, bool spoilt) {
  const Tile& tile = consumer.tile;
  if (!named_barrier_or(kOneWarpgroup + consumer.warpgroup, kWarpgroupThreads, spoilt)) return;
  if (threadIdx.x % kWarpgroupThreads == 0) tma_store_wait<0>();
  named_barrier_sync(kOneWarpgroup + consumer.warpgroup, kWarpgroupThreads);
  const int first_row = tile.first_row + consumer.place.half * kRows + threadIdx.x / 32 % 4 * 16;
  const int end_column = min(first_column + num_columns, static_cast<int>(consumer.args.problem.value.shape[3]));
#pragma unroll 1
  for (int row = first_row; row < first_row + 16; ++row) {
    mend_row<typename C::T>(consumer.args.problem, consumer.args.sequences, tile.sequence, tile.head, row, first_column,
                            end_column);
  }
}

/// The warpgroup's finished 64 rows from shared memory to the columns first_column … + P::kHeadDim - 1 of the output.
template <class P>
__device__ __forceinline__ void copy_columns(const KernelArgs& args, const Tile& tile, int warpgroup, int first_row,
                                             const uint8_t (*staged)[kPanelBytes], int first_column) {
  constexpr int kNumPanels = P::kHeadDim / 64;
  if (!prefill_sm90::box_fits(args, tile, first_row)) {
    __syncwarp();
    for (int panel = 0; panel < kNumPanels; ++panel) {
      prefill_sm90::store_rows<P>(args, staged[panel], tile, first_row, first_column / 64 + panel);
    }
    return;
  }
  fence_async_proxy();
  named_barrier_sync(kOneWarpgroup + warpgroup, kWarpgroupThreads);
  if (threadIdx.x % kWarpgroupThreads != 0) return;
  for (int panel = 0; panel < kNumPanels; ++panel) {
    tma_store(&args.out, staged[panel], first_column + panel * 64, tile.row_base + first_row, tile.head, tile.batch);
  }
  tma_store_commit();
  tma_store_wait_read<0>();
}

/// Normalises the rows and writes the columns first_column … + kCount - 1 of the output, through the memory of the queries.
template <class C, int kCount>
__device__ __forceinline__ void store_columns(const Consumer<C>& consumer, float (&o)[kCount / 2], int first_column) {
  using P = Part<C, kCount>;
  const KernelArgs& args = consumer.args;
  const Tile& tile = consumer.tile;
  prefill_sm90::RowPair rows = consumer.rows;
  const int first_row = tile.first_row + consumer.place.half * kRows, row = first_row + consumer.row_in_block();
  uint8_t (*staged)[kPanelBytes] = consumer.shared.query + first_column / 64;
  prefill_sm90::finish_rows<P>(args, tile, row, rows, o);
#pragma unroll
  for (int panel = 0; panel < kCount / 64; ++panel) {
    prefill_sm90::stage_panel<P>(o, panel, staged[panel]);
  }
  copy_columns<P>(args, tile, consumer.warpgroup, first_row, staged, first_column);
  if (args.may_spoil_rows) mend_columns(consumer, first_column, kCount, has_spoilt_row(o, rows.sum));
}

/// Sums over all warpgroups' keys. finish_rows adds up four lanes, so that one of them has it all. Afterwards no product reads
/// queries, keys or values any longer.
template <class C>
__device__ __forceinline__ void add_sums(Consumer<C>& consumer) {
  float (&sum)[2] = consumer.rows.sum;
  const float own[2] = {quad_sum(sum[0]), quad_sum(sum[1])};
  consumer.gather(own);
  sum[0] = sum[1] = 0.0f;
  if (threadIdx.x % 4 != 0) return;
#pragma unroll
  for (int i = 0; i < 2 * C::kPairs; ++i) {
    const float* theirs = &consumer.shared.gathered[i][consumer.row_in_block()];
    sum[0] += theirs[0];
    sum[1] += theirs[8];
  }
}

/// The block's share of a split over the grid, for combine(): normalised output, maximum and sum.
template <class C>
__device__ __forceinline__ void store_partial(const Consumer<C>& consumer) {
  const KernelArgs& args = consumer.args;
  const AttentionParams& p = args.problem;
  const Tile& tile = consumer.tile;
  const int first_column = consumer.warpgroup * C::kColumns + threadIdx.x % 4 * 2,
            head_dim_v = static_cast<int>(p.value.shape[3]);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float reference = consumer.rows.reference[r], sum = quad_sum(consumer.rows.sum[r]);
    const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
    const int row = tile.first_row + consumer.place.half * kRows + consumer.row_in_block() + 8 * r;
    if (row >= tile.num_rows) continue;
    const int64_t heads = (consumer.place.split * p.query.shape[0] + tile.batch) * p.query.shape[1] + tile.head;
    const int64_t index = heads * p.query.shape[2] + row;
    if (consumer.warpgroup == 0 && threadIdx.x % 4 == 0) {
      args.partial_state[index] =
          make_float2(C::kModified || reference == -INFINITY ? reference : reference * p.softmax_scale, sum);
    }
    float* out = args.partial_out + index * head_dim_v;
#pragma unroll
    for (int i = 0; i < C::kColumns / 8; ++i) {
      if (first_column + 8 * i >= head_dim_v) break;
      *reinterpret_cast<float2*>(out + first_column + 8 * i) =
          make_float2(consumer.o[4 * i + 2 * r] * factor, consumer.o[4 * i + 2 * r + 1] * factor);
    }
  }
}

}  // namespace fa::prefill_sm90_wide
