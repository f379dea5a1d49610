// SPDX-License-Identifier: Apache-2.0
// The shared memory of a thread block of prefill_sm90, and all barriers by which its roles hand over to each other.
//
// Roles (producer.cuh, consumer.cuh): "schedule" is the warp that decides on tiles, "load" the lane that starts copies into
// shared memory, "clear" the warp that clears unused values, "store" the lane that copies output to device memory, "consume" each
// of the warps that multiply, of which a warpgroup has four. In small blocks one warp schedules and loads, and the consumers
// clear and store; without kStoreWarp the consumers of large blocks store, too.
//
//   barrier           who arrives, and so ends a phase             who waits      what the phase's end says
//   tile_full         schedule, one lane for each warpgroup        all others     the tile and what its rows see can be read
//   tile_empty        load, clear, store, consume                  schedule       nobody reads the tile any more
//   tile_wanted       load                                         schedule       the copies of the tile are nearly all started
//   query_full        the copy engine                              consume        a tile of Q is there, or one warpgroup's part
//   query_empty       store; consume where output has own buffers  load           its buffer may be filled again
//   key_full          the copy engine                              consume        a tile of K is there …
//   first_key_full    the copy engine; load without keys           consume        … but its first panel, where kFirstKeyApart
//   key_empty         consume                                      load           its buffer may be filled again
//   value_full        the copy engine; for a last tile clear       consume clear  a tile of V is there
//   value_empty       consume                                      load           its buffer may be filled again
//   last_value_full   the copy engine                              clear          a last tile of V is there, to be cleared
//   bias_full         the copy engine                              consume        a tile of the bias is there
//   bias_empty        consume                                      load           its buffer may be filled again
//   out_full          consume, the warps of one warpgroup          store          its output stands where its queries were
//   all_stored        store, at its end                            consume        all output is in device memory
//
// Where the copy engine ends a phase, the loading lane arrives and announces the bytes for which the phase then waits.
#pragma once

#include <cstdint>

#include "kernels/common/launch_early.h"
#include "kernels/common/mbarrier.cuh"
#include "kernels/common/warpgroup.cuh"
#include "kernels/prefill_sm90/args.h"
#include "kernels/prefill_sm90/mend.cuh"
#include "kernels/prefill_sm90/traits.cuh"

namespace fa::prefill_sm90 {

inline constexpr int kMaxWarpgroups = 4;  // consumer warpgroups
inline constexpr int kTileSlots = 2;      // tiles that are decided and not yet done

/// The hardware's numbered barriers (bar.sync); 0 is that of __syncthreads(). `first + i` is that of consumer warpgroup i.
enum NamedBarrier : int {
  kTurnBarrier = 1,                                   // + i: the warpgroup's turn to issue. It waits, the one before it arrives
  kWarpgroupBarrier = kTurnBarrier + kMaxWarpgroups,  // + i: the warpgroup's own 128 threads
  kConsumeBarrier = kWarpgroupBarrier + kMaxWarpgroups,  // once: consumers may use the barriers below …
  kScheduleBarrier,                                      // … and so may the scheduling warp …
  kProduceBarrier,                                       // … and the other producer warps
  kMendBarrier,                                          // once: all tiles with spoilt rows are known (mend.cuh)
};
static_assert(kMendBarrier < 16, "A thread block has 16 named barriers.");

template <class C>
struct SharedPlan {
  static constexpr int kTileReaders = C::kConsumerWarps + (C::kSmall ? 0 : C::kStoreWarp ? 3 : 2);

  // Tiles of 128-byte rows under the 128-byte swizzle, whose pattern repeats every 1024 bytes.
  alignas(1024) uint8_t query[C::kQueryStages][C::kQueryBytes];
  alignas(1024) uint8_t key[C::kStages][C::kKeyBytes];
  alignas(1024) uint8_t value[C::kStages][C::kKeyBytes];
  alignas(1024) uint8_t out[C::kOwnOutput ? C::kWarpgroups : 1][2][C::kOwnOutput ? 64 * 128 : 16];
  alignas(1024) uint8_t bias[C::kBiasStages > 0 ? C::kBiasStages * C::kBiasBytes : 16];

  // The barriers of the table above, with the number of arrivals that end a phase.
  Mbarrier<1> query_full[C::kQueryStages][C::kFoldedWarpgroups];
  Mbarrier<C::kOwnOutput ? C::kConsumerWarps : 1> query_empty[C::kQueryStages];
  Mbarrier<1> key_full[C::kStages];
  // Of a tile's first_key_full one warpgroup waits, which has done so when the tile's slot is free.
  static_assert(!C::kFirstKeyApart || C::kQueryStages >= kTileSlots, "The next phase must not begin before the last has ended.");
  Mbarrier<1> first_key_full[C::kFirstKeyApart ? C::kQueryStages : 1];
  Mbarrier<C::kConsumerWarps> key_empty[C::kStages];
  Mbarrier<1> value_full[C::kStages];
  Mbarrier<C::kConsumerWarps> value_empty[C::kStages];
  Mbarrier<1> bias_full[C::kBiasStages + 1];
  Mbarrier<C::kConsumerWarps> bias_empty[C::kBiasStages + 1];
  Mbarrier<C::kWarpgroups> tile_full[kTileSlots];
  Mbarrier<kTileReaders> tile_empty[kTileSlots];
  Mbarrier<1> tile_wanted;
  Mbarrier<1> last_value_full[kTileSlots];
  Mbarrier<4> out_full[C::kQueryStages][C::kWarpgroups];
  Mbarrier<1> all_stored;

  Tile tile[kTileSlots];
  RowsView view[kTileSlots][C::kWarpgroups];
  int longest_first[32];  // sequences, for the warp that schedules
  SpoiltTiles<kTileSlots> spoilt;
};

template <class Plan>
__device__ __forceinline__ void init_queries(Plan& shared) {
  for (auto& boxes : shared.query_full) {
    for (auto& full : boxes) full.init();
  }
  for (auto& empty : shared.query_empty) empty.init();
}

/// Until a consumer warpgroup's queries are there: its own, or where they come all at once those of the tile.
template <class Plan, class Position>
__device__ __forceinline__ void wait_for_queries(Plan& shared, const Position& position, int warpgroup) {
  auto& boxes = shared.query_full[position.stage];
  constexpr int kBoxes = sizeof(boxes) / sizeof(boxes[0]);
  boxes[kBoxes == 1 ? 0 : warpgroup].wait(position.phase);
}

/// Initialises the barriers. For one lane of each of the first four warps, which share the work: each barrier takes 20 clocks.
template <class C>
__device__ __forceinline__ void init_barriers(SharedPlan<C>& shared, int warp) {
  if (warp == 0) {
    init_queries(shared);
    if constexpr (C::kStoreWarp) {
      for (auto& stage : shared.out_full) {
        for (auto& barrier : stage) barrier.init();
      }
      shared.all_stored.init();
    }
  } else if (warp == 1) {
    init_ring(shared.key_full, shared.key_empty);
    if constexpr (C::kFirstKeyApart) {
      for (auto& barrier : shared.first_key_full) barrier.init();
    }
  } else if (warp == 2) {
    init_ring(shared.value_full, shared.value_empty);
  } else {
    init_ring(shared.tile_full, shared.tile_empty);
    shared.spoilt.init();
    for (auto& barrier : shared.last_value_full) barrier.init();
    shared.tile_wanted.init();
    if constexpr (C::kBiasStages > 0) init_ring(shared.bias_full, shared.bias_empty);
  }
  mbarrier_init_fence();
}

/// From here on the barriers of init_barriers are there, and earlier kernels have ended: for consumers, of which the first
/// warpgroup has initialised the barriers and tells the others. NOTE: bar.sync at one and the same barrier at several places of
/// the program is what compute-sanitizer's synccheck calls divergent, so each role waits at its own; and barrier.sync, which it
/// allows, made some instances run out of registers.
template <class C>
__device__ __forceinline__ void announce_barriers(int warpgroup) {
  if (warpgroup == 0) {
    named_barrier_arrive(kScheduleBarrier, kWarpgroupThreads + 32);
    if constexpr (!C::kSmall) named_barrier_arrive(kProduceBarrier, kWarpgroupThreads + 3 * 32);
  }
  named_barrier_sync(kConsumeBarrier, 32 * C::kConsumerWarps);
  if constexpr (!C::kSmall) wait_for_earlier_kernels();
}

/// … for the scheduling warp, though earlier kernels may still run …
__device__ __forceinline__ void wait_to_schedule() { named_barrier_sync(kScheduleBarrier, kWarpgroupThreads + 32); }

/// … and for the three other producer warps.
__device__ __forceinline__ void wait_to_produce() {
  named_barrier_sync(kProduceBarrier, kWarpgroupThreads + 3 * 32);
  wait_for_earlier_kernels();
}

/// Writes zeros over rows used … kTileN - 1 of a tile of values, by `num_threads` threads, for the tensor cores to read.
template <class C>
__device__ __forceinline__ void clear_rows(uint8_t* values, int used, int thread, int num_threads) {
#pragma unroll 1
  for (int i = max(used, 0) * 8 + thread; i < C::kTileN * 8; i += num_threads) {
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      *reinterpret_cast<uint4*>(values + panel * C::kTileN * 128 + i * 16) = make_uint4(0, 0, 0, 0);
    }
  }
  fence_async_proxy();
}

}  // namespace fa::prefill_sm90
