// SPDX-License-Identifier: Apache-2.0
// Everything about one instance of prefill_sm90_f8 that is known at compile time, derived from its row in the tile table
// (shape.h). Every template of the kernel takes one Traits, by the name C, as those do that it shares with prefill_sm90.
#pragma once

#include <cstdint>

#include "kernels/common/convert.cuh"
#include "kernels/common/warpgroup.cuh"
#include "kernels/prefill_sm90/traits.cuh"
#include "kernels/prefill_sm90_f8/shape.h"

namespace fa::prefill_sm90_f8 {

template <int kHeadDim_, Variant kVariant>
struct Traits {
  using T = Float8;
  static constexpr TileShape kShape = tile_shape(kHeadDim_, kVariant);

  // What the instance can do.
  static constexpr bool kStagedOnly = kVariant == Variant::kPlain;  // no mask
  static constexpr bool kModified = true;                           // when a tile ends, references are natural scores
  static constexpr bool kPlain = kVariant == Variant::kPlain;       // neither softcap nor bias nor ALiBi

  // Tiles.
  static constexpr int kHeadDim = kHeadDim_;              // the copy engine pads narrower heads with zeros
  static constexpr int kWarpgroups = kShape.warpgroups;   // consumer warpgroups: those that multiply
  static constexpr int kTileM = 64 * kWarpgroups;         // query rows
  static constexpr int kTileN = kShape.tile_n;            // keys
  static constexpr int kPanels = (kHeadDim + 127) / 128;  // of 128 columns, 128 bytes: the widest rows that the swizzle takes
  static constexpr bool kRowsBelowZero = kTileM > 64;     // a sequence's first tile may begin before its row 0
  static constexpr int kFoldedWarpgroups = kPlain ? kWarpgroups : 1;  // above 1, tiles may be folded (place_rows)
  static_assert(kTileN % 32 == 0 && kTileN <= 128 && kHeadDim % 64 == 0, "A row of transposed values has the keys of one tile.");

  // Sums. A product with the values of one tile has a sum of its own, of so many columns at a time, and is added to the output
  // by the FP32 unit.
  static constexpr int kSumColumns = kShape.sum_columns;
  static constexpr int kSums = kHeadDim / kSumColumns;
  // The tensor cores add up the rows' weights, too, as rounded: transposed values have eight more rows, the first of ones.
  static constexpr bool kSumsWeights = kShape.sums_weights;
  static constexpr int kOnesRows = kSumsWeights ? 8 : 0;
  static constexpr bool kOnesApart = kSumsWeights && kHeadDim > 64;  // in a product of their own
  static constexpr bool kOnesBehind = kShape.ones_behind;
  static_assert(!kOnesBehind || kOnesApart, "Nothing to wait for.");

  // Buffers in shared memory.
  static constexpr int kKeyStages = kShape.key_stages, kRawStages = kShape.raw_stages, kValueStages = kShape.value_stages;
  static constexpr int kQueryStages = kShape.query_stages;
  static constexpr uint32_t kQueryBytes = kTileM * 128 * kPanels;
  static constexpr uint32_t kTileBytes = kTileN * 128 * kPanels;         // of keys, or values as they come
  static constexpr uint32_t kValueBytes = (kHeadDim + kOnesRows) * 128;  // of values, transposed

  // Roles.
  static constexpr bool kSmall = false;      // producers are a warpgroup of their own
  static constexpr bool kAlikeApart = true;  // tiles that are alike are scheduled by code of their own
  static constexpr int kConverters = 2;      // warps that transpose values
  static constexpr bool kTakesTurns = kShape.takes_turns;
  static constexpr TurnEnd kTurnEnd = kShape.turn_end;
  static constexpr int kConsumerWarps = 4 * kWarpgroups;
  static constexpr int kThreads = 32 * kConsumerWarps + kWarpgroupThreads;

  // Registers of a thread.
  static constexpr int kEntryRegisters = prefill_sm90::registers_at_entry(kThreads, 1);
  static constexpr int kProducerRegisters = kWarpgroups == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kWarpgroups == 2 ? 232 : kWarpgroups == 3 ? 160 : 112;
  static_assert(kProducerRegisters + kWarpgroups * kConsumerRegisters <= (1 + kWarpgroups) * kEntryRegisters,
                "setmaxnreg hands registers from one warpgroup to another; consumers can't get more than producers give.");
};

}  // namespace fa::prefill_sm90_f8
