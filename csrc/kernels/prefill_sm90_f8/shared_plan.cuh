// SPDX-License-Identifier: Apache-2.0
// The shared memory of a thread block of prefill_sm90_f8, and all barriers by which its roles hand over to each other: those of
// prefill_sm90 (see there), but that values pass from the copy engine to the warps that transpose them into other buffers, and
// that the consumers write their own output.
//
//   barrier      who arrives, and so ends a phase    who waits   what the phase's end says
//   raw_full     the copy engine                     convert     a tile of V is there as it was
//   raw_empty    convert, a lane of each warp        load        its buffer may be filled again
//   value_full   convert, a lane of each warp        consume     a tile of V is there, transposed
//   value_empty  consume                             convert     its buffer may be filled again
//   query_empty  consume                             load        the tile of Q is no longer needed
//   tile_empty   load, convert, consume              schedule    nobody reads the tile any more
#pragma once

#include <cstdint>

#include "kernels/common/mbarrier.cuh"
#include "kernels/prefill_sm90/args.h"
#include "kernels/prefill_sm90/shared_plan.cuh"
#include "kernels/prefill_sm90_f8/traits.cuh"

namespace fa::prefill_sm90_f8 {

using prefill_sm90::KernelArgs;
using prefill_sm90::kTileSlots;
using prefill_sm90::kTurnBarrier;
using prefill_sm90::RowPair;
using prefill_sm90::RowsView;
using prefill_sm90::Tile;

template <class C>
struct SharedPlan {
  alignas(1024) uint8_t query[C::kQueryStages][C::kQueryBytes];
  alignas(1024) uint8_t key[C::kKeyStages][C::kTileBytes];
  alignas(1024) uint8_t raw[C::kRawStages][C::kTileBytes];
  alignas(1024) uint8_t value[C::kValueStages][C::kValueBytes];

  Mbarrier<1> query_full[C::kQueryStages][C::kFoldedWarpgroups];
  Mbarrier<C::kConsumerWarps> query_empty[C::kQueryStages];
  Mbarrier<1> key_full[C::kKeyStages];
  Mbarrier<C::kConsumerWarps> key_empty[C::kKeyStages];
  Mbarrier<1> raw_full[C::kRawStages];
  Mbarrier<C::kConverters> raw_empty[C::kRawStages];
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
    init_ring(shared.raw_full, shared.raw_empty);
  } else if (warp == 1) {
    init_ring(shared.key_full, shared.key_empty);
  } else if (warp == 2) {
    init_ring(shared.value_full, shared.value_empty);
  } else {
    init_ring(shared.tile_full, shared.tile_empty);
    shared.spoilt.init();
    shared.tile_wanted.init();
  }
  mbarrier_init_fence();
}

}  // namespace fa::prefill_sm90_f8
