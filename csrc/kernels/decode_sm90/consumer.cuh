// SPDX-License-Identifier: Apache-2.0
// A consumer warp of decode_sm90: 16 rows of each item, and every so many-th of its key tiles. Warps don't wait for each other
// before the end of an item, so that one's softmax runs beside another's products and the copies of both.
#pragma once

#include "kernels/decode_sm90/merge.cuh"
#include "kernels/decode_sm90/producer.cuh"
#include "kernels/decode_sm90/products.cuh"
#include "kernels/prefill_sm80/softmax.cuh"

namespace fa::decode_sm90 {

using prefill_sm80::exponentials;
using prefill_sm80::move_reference;
using prefill_sm80::RowState;

template <class C>
struct Consumer {
  using T = typename C::T;
  using Products = decode_sm90::Products<C>;

  const KernelArgs& args;
  SharedPlan<C::kWarps>& shared;
  unsigned char* ring;
  RingPlace place;  // of the warp's next tile …
  int ahead;        // … which is this many tiles behind the next item's first

  __device__ __forceinline__ Consumer(const KernelArgs& args_, SharedPlan<C::kWarps>& shared_, unsigned char* ring_)
      : args(args_), shared(shared_), ring(ring_) {
    ahead = static_cast<int>(threadIdx.x / 32) >> row_bits(args);
    place.advance(ahead, args.stages);
  }

  __device__ __forceinline__ int first_row() const {
    return static_cast<int>(threadIdx.x / 32 & (row_blocks(args) - 1)) * kRowsPerWarp;
  }
  /// [kWarps, merge_rows, merge_stride].
  __device__ __forceinline__ float* merged() const { return reinterpret_cast<float*>(ring + args.stages * C::kStageBytes); }
  /// Where the block's part is merged in a cluster. Each block has one piece, whose tiles have been read by then.
  __device__ __forceinline__ PartInShared<C> part_in_shared() const { return {reinterpret_cast<float*>(ring)}; }

  __device__ __forceinline__ void run() {
    for (unsigned i = 0;; ++i) {
      const unsigned slot = i % kItemSlots;
      shared.item_full[slot].wait(i / kItemSlots % 2);
      const Item& item = shared.item[slot];
      if (!item.valid) return;
      work_off(item);
      __syncwarp();
      if (threadIdx.x % 32 == 0) shared.item_empty[slot].arrive();
    }
  }

 private:
  /// Row `r` of the lane's two.
  __device__ __forceinline__ LaneRow own_row(const Item& item, int r) const {
    return lane_row(args, item, first_row() + threadIdx.x % 32 / 4 + 8 * r);
  }

  __device__ __forceinline__ void work_off(const Item& item) {
    typename Products::Queries queries;
    float factors[2];  // that make scores of products, of each of the lane's rows
    if constexpr (Products::kIsWhole) {
      if (__builtin_expect(load_queries<true>(item, queries, factors), 1)) return attend<true>(item, queries, factors);
    }
    load_queries<false>(item, queries, factors);
    attend<false>(item, queries, factors);
  }

  /// Multiplies the warp's tiles of the item and ends it. kWhole: the queries are whole numbers. NOTE: one end for both kinds of
  /// queries would cost 30 registers.
  template <bool kWhole>
  __device__ __forceinline__ void attend(const Item& item, const typename Products::Queries& queries, const float (&factors)[2]) {
    typename Products::Out out = {};
    RowState<1> state;
    const int key_warps = C::kWarps >> row_bits(args), tiles = item.end - item.begin;
    const bool has_rows = first_row() < item.num_rows;
    int i = ahead;
#pragma unroll 1
    for (; i < tiles; i += key_warps) {
      const int stage = place.stage(args.stages);
      shared.full[stage].wait(place.phase(args.stages));
      if (has_rows) {
        const int tile = item.begin + i;
        const uint32_t keys = shared_address(ring) + stage * C::kStageBytes;
        if (tile >= item.full_begin && tile < item.full_end) {
          process_tile<false, kWhole>(item, queries, factors, tile, keys, out, state);
        } else {
          process_tile<true, kWhole>(item, queries, factors, tile, keys, out, state);
        }
      }
      __syncwarp();
      if (threadIdx.x % 32 == 0) mbarrier_arrive(&shared.empty[stage]);
      place.advance(key_warps, args.stages);
    }
    ahead = i - tiles;
    finish(item, out, state);
  }

  /// Loads the warp's operands, with kWhole as whole numbers. Returns false where these don't hold the queries, of which one is
  /// infinite or NaN.
  template <bool kWhole>
  __device__ __forceinline__ bool load_queries(const Item& item, typename Products::Queries& queries, float (&factors)[2]) {
    const TensorView& query = args.problem.query;
    const T* data[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const LaneRow row = own_row(item, r);
      const T* head = static_cast<const T*>(query.data) + item.batch * query.stride[0] + row.head * query.stride[1];
      data[r] = row.in_use ? head + (item.row_base + row.row) * query.stride[2] : nullptr;
    }
    const int head_dim = static_cast<int>(query.shape[3]);
    Products::load_queries(queries, data, head_dim);
    bool is_finite = true;
    if constexpr (C::kIsQuantized) {
      const Scales scales = scales_of(args.key_scale, item.key_head);
      const bool has_second = first_row() + 8 < item.num_rows;
      is_finite = Products::template scale_queries<kWhole>(queries, factors, has_second, head_dim, scales);
      for (float& factor : factors) factor *= args.problem.softmax_scale;
    }
    if constexpr (kWhole) return __all_sync(kAllLanes, is_finite);
    return true;
  }

  /// Scores, softmax and the product with the values. kTest: some rows may not see all keys of the tile, or scores need more than
  /// a scale. kWhole: the queries are whole numbers.
  template <bool kTest, bool kWhole>
  __device__ __forceinline__ void process_tile(const Item& item, const typename Products::Queries& queries,
                                               const float (&factors)[2], int tile, uint32_t stage, typename Products::Out& out,
                                               RowState<1>& state) {
    typename Products::Scores scores;
    typename Products::Weights weights;
    if constexpr (kWhole) {
      Products::multiply_whole_keys(scores, queries, stage + Products::key_lane(), args.layout);
    } else {
      Products::multiply_keys(scores, queries, stage + Products::key_lane(), args.layout);
    }
#pragma unroll
    for (int i = 0; i < 4 * C::kKeyBlocks; ++i)
      scores[0][i / 4][i % 4] *= C::kIsQuantized ? factors[i % 4 / 2] : args.problem.softmax_scale;
    SeenKeys seen;
    if constexpr (kTest) {
      const LaneRow rows[2] = {own_row(item, 0), own_row(item, 1)};  // NOTE: kept, they would cost the loop its registers
      if (args.modified) modify_scores<C>(scores, args.problem, item, rows, tile * C::kTileN);
      seen = hide_keys<C>(scores, args.problem, item, rows, tile * C::kTileN);
    }
    move_reference(scores, out, state, kLog2E);
    exponentials<typename C::Operand, true>(scores, weights, state, kLog2E);
    const uint32_t values = stage + C::kValueOffset + Products::value_lane();
    if constexpr (kTest) {
      Products::multiply_seen_values(out, weights, values, args.layout, seen);
    } else {
      Products::multiply_values(out, weights, values, args.layout);
    }
  }

  /// The warp's rows to shared memory, where all warps of the block merge them.
  __device__ __forceinline__ void finish(const Item& item, const typename Products::Out& out, const RowState<1>& state) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    named_barrier_sync(kConsumerBarrier, 32 * C::kWarps);  // what the last item left there has been read
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = quad_sum(state.sum[0][r]);
      const int row = g + 8 * r;
      if (row >= args.merge_rows) continue;
      if (t == 0) shared.state[warp][row] = make_float2(state.reference[0][r], sum);
      float* data = merged() + (warp * args.merge_rows + row) * merge_stride(C::kHeadDim);
#pragma unroll
      for (int i = 0; i < C::kHeadDim / (4 * Products::kRun); ++i) Products::store_run(data, out, i, r);
    }
    named_barrier_sync(kConsumerBarrier, 32 * C::kWarps);
    if (row_bits(args) == 0) {
      merge_warps<C, true>(args, shared, item, merged(), part_in_shared());
    } else {
      merge_warps<C, false>(args, shared, item, merged(), part_in_shared());
    }
    if (item.num_parts == 1) return;
    if (item.in_cluster) {
      merge_in_cluster<C>(args, item, part_in_shared());
    } else {
      finish_head<C>(args, shared, item);
    }
  }
};

}  // namespace fa::decode_sm90
