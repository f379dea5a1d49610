// SPDX-License-Identifier: Apache-2.0
// The end of a tile in prefill_sm90: normalise, convert, and write 64 rows through shared memory, by the copy engine, or row by
// row where a box would touch rows of another sequence.
#pragma once

#include "kernels/common/convert.cuh"
#include "kernels/common/reduce.cuh"
#include "kernels/common/tma.cuh"
#include "kernels/prefill_sm90/args.h"
#include "kernels/prefill_sm90/shared_plan.cuh"
#include "kernels/prefill_sm90/softmax.cuh"

namespace fa::prefill_sm90 {

/// Four 8x8 matrices of 16-bit elements from the accumulator layout to rows of shared memory; lane l gives row l % 8 of matrix l
/// / 8.
__device__ __forceinline__ void store_matrices(uint32_t shared, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

/// Columns of a panel: of 128 bytes, the widest rows that the swizzle takes.
template <class T>
inline constexpr int kPanelColumns = 128 / sizeof(T);

/// Is it one of the rows 0 … end - 1?
template <class C>
__device__ __forceinline__ bool is_row(int row, int end) {
  return C::kRowsBelowZero ? static_cast<unsigned>(row) < static_cast<unsigned>(end) : row < end;
}

/// Sinks and log-sum-exp of the thread's two rows; `used`: which of them there are. Apart from finish_rows, which few problems
/// need more than: these exponentials and logarithms are a fifth of a short tile's time.
template <class C>
__device__ __forceinline__ void finish_sums(const KernelArgs& args, const Tile& tile, int row, const bool (&used)[2],
                                            RowPair& rows) {
  const AttentionParams& p = args.problem;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float reference = rows.reference[r];
    const float highest = C::kModified || reference == -INFINITY ? reference : reference * p.softmax_scale;
    SoftmaxState state{highest, rows.sum[r]};
    if (p.sinks.present) {
      state = add_sink(state, static_cast<const float*>(p.sinks.data)[tile.head * p.sinks.stride[0]]);
      rows.sum[r] = state.sum;
      rows.factor[r] = used[r] ? normalizer(state) * rescale_factor(highest, state.max) : 0.0f;
    }
    if (p.lse.present && threadIdx.x % 4 == 0 && is_row<C>(row + 8 * r, tile.num_rows)) {
      float* row_lse = static_cast<float*>(p.lse.data) + tile.batch * p.lse.stride[0] + tile.head * p.lse.stride[1];
      row_lse[(tile.row_base + row + 8 * r) * p.lse.stride[2]] = used[r] ? lse(state) : -INFINITY;
    }
  }
}

/// Ends the thread's two rows: sum, sink, log-sum-exp, normalised output. Rows that see no key become 0, and rows.sum too.
template <class C>
__device__ __forceinline__ void finish_rows(const KernelArgs& args, const Tile& tile, int row, RowPair& rows,
                                            float (&o)[C::kHeadDim / 2]) {
  const bool used[2] = {is_row<C>(row, tile.query_length), is_row<C>(row + 8, tile.query_length)};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    rows.sum[r] = quad_sum(rows.sum[r]);
    rows.factor[r] = used[r] && rows.sum[r] != 0.0f ? reciprocal_approx(rows.sum[r]) : 0.0f;
  }
  if (args.problem.sinks.present || args.problem.lse.present) finish_sums<C>(args, tile, row, used, rows);
  rescale_rows(o, rows.factor);
  if (used[0] && used[1]) return;
#pragma unroll
  for (int j = 0; j < C::kHeadDim / 2; ++j) {  // NOTE: the queries of unused rows may be NaN, and NaN * 0 is NaN
    if (!used[j / 2 % 2]) o[j] = 0.0f;
  }
}

/// The warp's 16 rows of a panel from shared memory to device memory, 16 bytes a thread, as far as the sequence and the head
/// reach.
template <class C>
__device__ __forceinline__ void store_rows(const KernelArgs& args, const uint8_t* staged, const Tile& tile, int first_row,
                                           int panel) {
  const TensorView& out = args.problem.out;
  auto* base = static_cast<typename C::T*>(out.data) + tile.batch * out.stride[0] + tile.head * out.stride[1];
  for (int i = threadIdx.x % 32; i < 16 * 8; i += 32) {
    const int row = threadIdx.x / 32 % 4 * 16 + i / 8, column = (panel * 8 + i % 8) * (kPanelColumns<typename C::T> / 8);
    if (is_row<C>(first_row + row, tile.num_rows) && column < out.shape[3]) {
      const uint4 data = *reinterpret_cast<const uint4*>(staged + swizzled_offset(row, i % 8));
      *reinterpret_cast<uint4*>(base + (tile.row_base + first_row + row) * out.stride[2] + column) = data;
    }
  }
}

/// Columns 64 panel … + 63 of the warp's 16 finished rows to shared memory.
template <class C>
__device__ __forceinline__ void stage_panel(const float (&o)[C::kHeadDim / 2], int panel, uint8_t* staged) {
  using T = typename C::T;
  const int thread = threadIdx.x % kWarpgroupThreads, staged_row = thread / 32 * 16 + thread % 16;
  const uint32_t first = shared_address(staged) + swizzled_offset(staged_row, thread % 32 / 16);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int j = 4 * panel + i;
    if (j >= C::kHeadDim / 16) break;
    store_matrices(swizzled_step(first, i), pack2<T>(o[8 * j], o[8 * j + 1]), pack2<T>(o[8 * j + 2], o[8 * j + 3]),
                   pack2<T>(o[8 * j + 4], o[8 * j + 5]), pack2<T>(o[8 * j + 6], o[8 * j + 7]));
  }
}

/// Puts the warpgroup's 64 finished rows where the tile's queries stood. Copied from there by one thread (copy_out), but for rows
/// that the copy engine can't take, which are written at once.
template <class C>
__device__ __forceinline__ void stage_tile(const KernelArgs& args, const Tile& tile, int warpgroup,
                                           const float (&o)[C::kHeadDim / 2], uint8_t* queries) {
  const int first_row = first_row_of<C::kFoldedWarpgroups>(tile, warpgroup);
  // Products read the queries of all warps; a warp itself reads those of its own rows alone.
  if constexpr (16 * C::kQuerySteps < C::kHeadDim) named_barrier_sync(kWarpgroupBarrier + warpgroup, kWarpgroupThreads);
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel) {
    stage_panel<C>(o, panel, queries + panel * C::kTileM * 128);
  }
  if (!box_fits(args, tile, first_row)) {
    __syncwarp();
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      store_rows<C>(args, queries + panel * C::kTileM * 128, tile, first_row, panel);
    }
  }
  fence_async_proxy();
}

/// One thread: starts the copy of a warpgroup's 64 rows, if the copy engine can take them, from where its queries stood. The
/// caller commits.
template <class C>
__device__ __forceinline__ void copy_out(const KernelArgs& args, const Tile& tile, int warpgroup, const uint8_t* queries) {
  const int first_row = first_row_of<C::kFoldedWarpgroups>(tile, warpgroup);
  if (!box_fits(args, tile, first_row)) return;
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel) {
    tma_store(&args.out, queries + panel * C::kTileM * 128, panel * kPanelColumns<typename C::T>, tile.row_base + first_row,
              tile.head, tile.batch);
  }
}

/// The warpgroup's 64 finished rows to device memory through two panels of its own, each of whose last copy must then have ended.
template <class C>
__device__ __forceinline__ void store_by_panels(const KernelArgs& args, const Tile& tile, int warpgroup,
                                                const float (&o)[C::kHeadDim / 2], uint8_t (&panels)[2][64 * 128]) {
  const int first_row = first_row_of<C::kFoldedWarpgroups>(tile, warpgroup);
  const bool first_thread = threadIdx.x % kWarpgroupThreads == 0, fits = box_fits(args, tile, first_row);
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel) {
    uint8_t* staged = panels[panel % 2];
    // NOTE: an odd number of panels ends and begins with the same buffer.
    constexpr int kPendingAtFirst = C::kPanels % 2 == 0 ? 1 : 0;
    if (first_thread) panel == 0 ? tma_store_wait_read<kPendingAtFirst>() : tma_store_wait_read<1>();
    named_barrier_sync(kWarpgroupBarrier + warpgroup, kWarpgroupThreads);
    stage_panel<C>(o, panel, staged);
    fence_async_proxy();
    named_barrier_sync(kWarpgroupBarrier + warpgroup, kWarpgroupThreads);
    if (!fits) store_rows<C>(args, staged, tile, first_row, panel);
    if (fits && first_thread) tma_store(&args.out, staged, panel * 64, tile.row_base + first_row, tile.head, tile.batch);
    if (first_thread) tma_store_commit();
  }
}

}  // namespace fa::prefill_sm90
