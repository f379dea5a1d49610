// SPDX-License-Identifier: Apache-2.0
// The shared memory of a thread block of prefill_sm90_f32, and all barriers by which its roles hand over to each other: those of
// prefill_sm90 (see there), but that keys and values pass from the copy engine to the warps that convert them, and from these to
// those that multiply, and that a consumer warpgroup copies its own output.
//
//   barrier      who arrives, and so ends a phase    who waits   what the phase's end says
//   key_raw      the copy engine                     convert     a tile of K is there as it was
//   key_full     convert, a lane of each warp        consume     it is there as an operand
//   key_empty    consume                             load        its buffer may be filled again
//   value_raw, value_full, value_empty               likewise, of V
//   query_full   the copy engine                     consume     a tile of Q is there, or one warpgroup's part
//   query_empty  consume, one lane a warpgroup       load        its output has left the buffer, which may be filled again
//   tile_empty   load, convert, consume              schedule    nobody reads the tile any more
#pragma once

#include <cstdint>

#include "kernels/common/mbarrier.cuh"
#include "kernels/prefill_sm90/args.h"
#include "kernels/prefill_sm90/shared_plan.cuh"
#include "kernels/prefill_sm90_f32/traits.cuh"

namespace fa::prefill_sm90_f32 {

using prefill_sm90::KernelArgs;
using prefill_sm90::kTileSlots;
using prefill_sm90::kWarpgroupBarrier;
using prefill_sm90::RowPair;
using prefill_sm90::RowsView;
using prefill_sm90::Tile;

/// K: panels of 32 columns, in each first the keys' high parts, then the low ones. V: for every 32 keys a panel of kHeadDim rows,
/// transposed, the high parts of all first.
template <class C>
struct SharedPlan {
  alignas(1024) uint8_t query[C::kQueryStages][C::kQueryBytes];
  alignas(1024) uint8_t key[C::kKeyStages][C::kParts * C::kTileBytes];
  alignas(1024) uint8_t value[C::kValueStages][C::kParts * C::kTileBytes];

  Mbarrier<1> query_full[C::kQueryStages][C::kFoldedWarpgroups];
  Mbarrier<C::kWarpgroups> query_empty[C::kQueryStages];
  Mbarrier<1> key_raw[C::kKeyStages];
  Mbarrier<C::kConverters> key_full[C::kKeyStages];
  Mbarrier<C::kConsumerWarps> key_empty[C::kKeyStages];
  Mbarrier<1> value_raw[C::kValueStages];
  Mbarrier<C::kConverters> value_full[C::kValueStages];
  Mbarrier<C::kConsumerWarps> value_empty[C::kValueStages];
  Mbarrier<C::kWarpgroups> tile_full[kTileSlots];
  Mbarrier<C::kConsumerWarps + C::kConverters + 1> tile_empty[kTileSlots];
  Mbarrier<1> tile_wanted;

  Tile tile[kTileSlots];
  RowsView view[kTileSlots][C::kWarpgroups];
  int longest_first[32];  // sequences, for the warp that schedules
  prefill_sm90::SpoiltTiles<kTileSlots> spoilt;
};

/// Initialises the barriers. For one lane of each of the first four warps, which share the work.
template <class C>
__device__ __forceinline__ void init_barriers(SharedPlan<C>& shared, int warp) {
  if (warp == 0) {
    prefill_sm90::init_queries(shared);
  } else if (warp == 1) {
    init_ring(shared.key_full, shared.key_empty);
    for (auto& barrier : shared.key_raw) barrier.init();
  } else if (warp == 2) {
    init_ring(shared.value_full, shared.value_empty);
    for (auto& barrier : shared.value_raw) barrier.init();
  } else {
    init_ring(shared.tile_full, shared.tile_empty);
    shared.spoilt.init();
    shared.tile_wanted.init();
  }
  mbarrier_init_fence();
}

}  // namespace fa::prefill_sm90_f32
