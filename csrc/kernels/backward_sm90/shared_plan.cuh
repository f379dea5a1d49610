// SPDX-License-Identifier: Apache-2.0
// The shared memory of a thread block of backward_sm90, and all barriers by which its roles hand over to each other.
//
// Roles (producer.cuh, consumer.cuh): "load" is the lane that draws items and starts copies into shared memory, "poll" the lane
// that waits for other blocks' turns, "add" the lane that has the copy engine add to d_query and passes the turn on, "consume"
// each of the warps that multiply. Where there is a bias, a lane "bias" copies it, and as in pairs of blocks (pair_plan.cuh)
// "consume" adds, and a lane "signal" passes the turn on.
//
//   barrier      who arrives, and so ends a phase   who waits            what the phase's end says
//   item_full    load                               all others           the item can be read
//   item_empty   all others                         load                 nobody reads the item any more
//   key_full     the copy engine                    consume              an item's tile of K is there (value_full: of V)
//   key_empty    consume                            load                 its buffer may be filled again (value_empty)
//   query_full   the copy engine                    consume              a tile of Q and its log-sum-exp are there
//   query_empty  consume                            load                 its buffer may be filled again
//   out_full     the copy engine                    consume              a tile of dO and its delta are there
//   out_empty    consume                            load                 its buffer may be filled again
//   dq_full      consume                            add                  a warpgroup's part of a tile's dQ is there; in the last
//                                                                        turn: it has read the sum of the others
//   dq_empty     add                                consume              the place of that part may be filled again
//   sum_full     the copy engine                    consume              in the last turn: the sum of the others is in that place
//   turn_full    poll                               add                  the key tiles before this one have added to d_query
//   turn_empty   add                                poll                 this block has, too, and the next one has been told
//
// Where "consume" adds, there are no dq_ and sum_ barriers, but:
//
//   turn_full    poll                               consume              the key tiles before this one have added to d_query
//   turn_done    consume                            signal               this block has added to it
//   turn_empty   signal                             poll                 … and the next one has been told
//   bias_full    the copy engine                    consume              a step's bias and the rest of its references are there
//   bias_empty   consume                            bias                 dQ has been computed from dS, which took its place
//
// For "consume" lane 0 of each warp arrives where only tensor cores have read (key_empty, value_empty) and where device memory
// is ordered (turn_done, after a __syncwarp()). Every lane arrives where lanes read shared memory themselves: the item, and the
// numbers that come with tiles of Q and dO. For these the order would hold with lane 0 alone, since a warpgroup meets at its
// score_barrier() after it has read and before it arrives; but compute-sanitizer's racecheck does not see that order.
#pragma once

#include <cstdint>

#include "kernels/backward_sm90/args.h"
#include "kernels/backward_sm90/traits.cuh"
#include "kernels/common/mbarrier.cuh"

namespace fa::backward_sm90 {

inline constexpr int kItemSlots = 2;     // items that are drawn and not yet done
inline constexpr int kScoreBuffers = 2;  // for gradients of scores
inline constexpr int kTurnSlots = 2;     // query tiles whose turn has come and not yet been passed on

/// The hardware's numbered barriers; 0 is that of __syncthreads().
enum NamedBarrier : int {
  kConsumeBarrier = 1,  // all consumers
  kScoreBarriers = 2,   // … and those behind it: score_barrier()
};

/// Where a warpgroup waits for both warpgroups' gradients of scores, of which the other only says that its own are there. Each
/// buffer has its own, since the other may be a step ahead.
__device__ __forceinline__ int score_barrier(int buffer, int warpgroup) { return kScoreBarriers + 2 * buffer + warpgroup; }

/// The work between two stores of d_key and d_value: one tile of keys of one key head, with all rows of all query heads that
/// see any of its keys.
struct alignas(16) Item {
  int valid;  // 0: there are no more
  int batch, key_head, key_tile;
  int first_query_tile;                // of the sequence, among those of head 0
  int first_row, first_key, num_keys;  // of the sequence in its batch entry; 0, 0 and all keys where sequences aren't packed
  View view;
  TileSpan query_tiles;
  bool backwards;   // the last of them come first
  bool descending;  // later key tiles add to a query tile's gradient before this one
};

/// A query head and one of its tiles, of those that see an item's keys.
struct Place {
  int head, count;

  Place() = default;
  __device__ __forceinline__ explicit Place(const Item& item, int heads_per_key_head)
      : head(item.key_head * heads_per_key_head), count(0) {}
  __device__ __forceinline__ int tile(const Item& item) const {
    return item.backwards ? item.query_tiles.end - 1 - count : item.query_tiles.begin + count;
  }
  __device__ __forceinline__ void advance(const Item& item) {
    if (++count < item.query_tiles.end - item.query_tiles.begin) return;
    count = 0;
    ++head;
  }
};

/// How many places there are.
__device__ __forceinline__ int num_places(const Item& item, int heads_per_key_head) {
  return (item.query_tiles.end - item.query_tiles.begin) * heads_per_key_head;
}

template <class C>
struct SharedPlan {
  using Config = C;

  // Tiles of 128-byte rows under the 128-byte swizzle, whose pattern repeats every 1024 bytes.
  alignas(1024) uint8_t key[C::kKeyStages][C::kKeyBytes];
  alignas(1024) uint8_t value[C::kKeyStages][C::kKeyBytes];
  alignas(1024) uint8_t query[C::kStages][C::kQueryBytes];
  alignas(1024) uint8_t d_out[C::kStages][C::kQueryBytes];
  // Rows of queries, a panel for each warpgroup's keys. A bias comes where the gradients of its scores will stand.
  alignas(1024) uint8_t d_scores[kScoreBuffers][C::kWarpgroups][C::kTileM * 128];
  alignas(128) float dq[C::kStaged ? C::kWarpgroups : 1][C::kStaged ? C::kPartElements : 4];  // in the order of registers
  alignas(128) float lse[C::kStages][C::kTileM];
  alignas(128) float delta[C::kStages][C::kTileM];
  alignas(128) float rest[C::kHasBias ? kScoreBuffers : 1][C::kHasBias ? C::kTileM : 4];  // of lse; comes with the bias

  // The barriers of the table above, with the number of arrivals that end a phase.
  Mbarrier<1> item_full[kItemSlots];
  Mbarrier<C::kConsumerThreads + (C::kHasBias ? 3 : 2)> item_empty[kItemSlots];
  Mbarrier<1> key_full[C::kKeyStages], value_full[C::kKeyStages];
  Mbarrier<C::kConsumerWarps> key_empty[C::kKeyStages], value_empty[C::kKeyStages];
  Mbarrier<1> query_full[C::kStages], out_full[C::kStages];
  Mbarrier<C::kConsumerThreads> query_empty[C::kStages], out_empty[C::kStages];
  Mbarrier<1> bias_full[kScoreBuffers];
  Mbarrier<C::kConsumerThreads> bias_empty[kScoreBuffers];
  Mbarrier<C::kConsumerThreads / C::kWarpgroups> dq_full[C::kWarpgroups];
  Mbarrier<1> dq_empty[C::kWarpgroups], sum_full[C::kWarpgroups];
  Mbarrier<1> turn_full[kTurnSlots], turn_empty[kTurnSlots];
  Mbarrier<C::kConsumerWarps> turn_done[kTurnSlots];

  Item item[kItemSlots];

  /// For one thread; a block barrier must follow.
  __device__ __forceinline__ void init() {
    init_ring(item_full, item_empty);
    init_ring(key_full, key_empty);
    init_ring(value_full, value_empty);
    init_ring(query_full, query_empty);
    init_ring(out_full, out_empty);
    if (C::kHasBias) init_ring(bias_full, bias_empty);
    if (C::kStaged) init_ring(dq_full, dq_empty);
    for (auto& barrier : sum_full) barrier.init();
    init_ring(turn_full, turn_empty);
    for (auto& barrier : turn_done) barrier.init();
    mbarrier_init_fence();
  }
};

}  // namespace fa::backward_sm90
