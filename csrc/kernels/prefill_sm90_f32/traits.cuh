// SPDX-License-Identifier: Apache-2.0
// Everything about one instance of prefill_sm90_f32 that is known at compile time, derived from its row in the tile table
// (shape.h). Every template of the kernel takes one Traits, by the name C, as those do that it shares with prefill_sm90.
#pragma once

#include <cstdint>

#include "kernels/common/warpgroup.cuh"
#include "kernels/prefill_sm90/traits.cuh"
#include "kernels/prefill_sm90_f32/shape.h"

namespace fa::prefill_sm90_f32 {

template <int kHeadDim_, Float32Precision kPrecision>
struct Traits {
  using T = float;
  static constexpr TileShape kShape = tile_shape(kHeadDim_, kPrecision);

  // What the instance can do.
  static constexpr bool kSplit = kPrecision == Float32Precision::kTf32x3;  // each operand is the sum of two TF32 numbers
  static constexpr bool kStagedOnly = false;                               // any bias and any mask
  static constexpr bool kModified = true;                                  // when a tile ends, references are natural scores
  static constexpr bool kVotesOnMasks = false;

  // Tiles.
  static constexpr int kHeadDim = kHeadDim_;                 // the copy engine pads narrower heads with zeros
  static constexpr int kWarpgroups = kShape.warpgroups;      // consumer warpgroups: those that multiply
  static constexpr int kTileM = 64 * kWarpgroups;            // query rows
  static constexpr int kTileN = kShape.tile_n;               // keys
  static constexpr int kPanels = kHeadDim / 32;              // of 32 columns, 128 bytes: the widest rows that the swizzle takes
  static constexpr int kParts = kSplit ? 2 : 1;              // TF32 numbers of an element of K and V
  static constexpr int kOutColumns = kShape.out_columns;     // of the output that one sum over a tile's keys takes; where kSplit
  static constexpr int kHeldSteps = 4 * kShape.held_panels;  // of 8 columns of Q that a thread holds for a whole tile
  static constexpr bool kRowsBelowZero = kTileM > 64;        // a sequence's first tile may begin before its row 0
  static constexpr int kFoldedWarpgroups = kWarpgroups;      // above 1, tiles may be folded (place_rows)
  static_assert(kHeadDim % 32 == 0 && kTileN % 32 == 0, "Values are transposed in blocks of 32 keys and 32 columns.");

  // Buffers in shared memory.
  static constexpr int kKeyStages = kShape.key_stages, kValueStages = kShape.value_stages, kQueryStages = kShape.query_stages;
  static constexpr uint32_t kQueryBytes = kTileM * 128 * kPanels;
  static constexpr uint32_t kTileBytes = kTileN * 128 * kPanels;  // of keys or values, as they come
  static constexpr uint32_t kBlockBytes = 32 * 128;               // 32 rows of a panel

  // Roles.
  static constexpr bool kSmall = false;      // producers are a warpgroup of their own
  static constexpr bool kAlikeApart = true;  // tiles that are alike are scheduled by code of their own
  static constexpr int kConverters = 2;      // warps that make operands of keys and values
  static constexpr int kConsumerWarps = 4 * kWarpgroups;
  static constexpr int kThreads = 32 * kConsumerWarps + kWarpgroupThreads;

  // Registers of a thread. With one consumer warpgroup there are enough for all.
  static constexpr bool kMovesRegisters = kWarpgroups > 1;
  static constexpr int kEntryRegisters = prefill_sm90::registers_at_entry(kThreads, 1);
  static constexpr int kProducerRegisters = kWarpgroups == 2 ? 72 : kWarpgroups == 3 ? 56 : 64;
  static constexpr int kConsumerRegisters = kWarpgroups == 2 ? 216 : kWarpgroups == 3 ? 152 : 104;
  static_assert(!kMovesRegisters || kProducerRegisters + kWarpgroups * kConsumerRegisters <= (1 + kWarpgroups) * kEntryRegisters,
                "setmaxnreg hands registers from one warpgroup to another; consumers can't get more than producers give.");
};

}  // namespace fa::prefill_sm90_f32
