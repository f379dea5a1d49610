// SPDX-License-Identifier: Apache-2.0
// Everything about one instance of prefill_sm90 that is known at compile time, derived from its row in the tile table (shape.h),
// and the budgets of registers that it must keep. Every template of the kernel takes one Traits, by the name C.
#pragma once

#include <cstdint>

#include "kernels/common/warpgroup.cuh"
#include "kernels/prefill_sm90/instances.h"
#include "kernels/prefill_sm90/shape.h"

namespace fa::prefill_sm90 {

inline constexpr int kFewInLast = 16;  // keys of a last key tile that makes its own way (Traits::kFewApart)

/// Registers of a thread when the kernel starts. A multiprocessor has four partitions of 16,384, and each holds a quarter of the
/// resident warps.
constexpr int registers_at_entry(int threads, int blocks_per_sm) {
  const int warps = (threads / 32 * blocks_per_sm + 3) / 4;
  return 16384 / (32 * warps) / 8 * 8;
}

template <typename T_, int kHeadDim_, Variant kVariant>
struct Traits {
  using T = T_;
  static constexpr TileShape kShape = tile_shape(kHeadDim_, kVariant);

  // What the instance can do.
  static constexpr bool kStagedOnly = kVariant == Variant::kModifiedTall;  // no mask, and no bias but by the copy engine
  static constexpr bool kModified = modifies_scores(kVariant);             // scores are natural, not raw products
  static constexpr bool kAddsQueryBias = adds_query_bias(kHeadDim_, kVariant);

  // Tiles.
  static constexpr int kHeadDim = kHeadDim_;              // multiple of 16; the copy engine pads narrower heads with zeros
  static constexpr int kWarpgroups = kShape.warpgroups;   // consumer warpgroups: those that multiply
  static constexpr int kTileM = kShape.rows();            // query rows
  static constexpr int kTileN = kShape.tile_n;            // keys
  static constexpr int kPanels = (kHeadDim + 63) / 64;    // of 64 columns, 128 bytes: the widest rows that the swizzle takes
  static constexpr int kBiasPanels = (kTileN + 63) / 64;  // likewise of a bias, whose columns are keys
  static constexpr bool kRowsBelowZero = kTileM > 64;     // a sequence's first tile may begin before its row 0
  static constexpr int kFoldedWarpgroups = kModified ? 1 : kWarpgroups;  // above 1, tiles may be folded (place_rows)
  // Of a tile's first K the first panel has a barrier of its own, so that the first product begins when it is there. With smaller
  // tiles of K the second wait costs more than that brings.
  static constexpr bool kFirstKeyApart = kFoldedWarpgroups > 1 && kPanels > 1 && kTileN >= 128;
  static_assert(kHeadDim % 16 == 0 && kTileN % 16 == 0, "wgmma sums 16 columns, and 16 keys, at a time.");

  // Buffers in shared memory.
  static constexpr int kStages = kShape.stages;             // for tiles of K, and as many for V
  static constexpr int kQueryStages = kShape.query_stages;  // for tiles of Q
  static constexpr int kBiasStages = kShape.bias_stages;    // for tiles of a 16-bit bias; 0: it is read from device memory
  static constexpr uint32_t kQueryBytes = kTileM * 128 * kPanels;
  static constexpr uint32_t kKeyBytes = kTileN * 128 * kPanels;
  static constexpr uint32_t kBiasBytes = kTileM * 128 * kBiasPanels;
  static_assert(kModified || kBiasStages == 0, "Only instances with modified scores add a bias.");

  // Roles. A small block has one warp for all that is not multiplication, and its consumers clear and copy for themselves; a
  // large one has a warpgroup for it, of which setmaxnreg gives registers to the consumers.
  static constexpr bool kSmall = kWarpgroups == 1;
  static constexpr int kConsumerWarps = 4 * kWarpgroups;
  // NOTE: that the consumer warpgroup is number 0 saves it a register, without which the compiler runs the products of 64 to 96
  // columns one after another (it says so: C7511).
  static constexpr bool kOnlyWarpgroup = kSmall && kHeadDim > 48;
  static constexpr int kThreads = 32 * kConsumerWarps + (kSmall ? 32 : kWarpgroupThreads);
  static constexpr int kBlocksPerSm = kShape.blocks_per_sm;

  // Ways through the kernel.
  static constexpr bool kPingPong = kShape.ping_pong;      // consumer warpgroups issue their products in turn
  static constexpr int kQuerySteps = kShape.query_steps;   // times 16 columns of Q that consumers keep in registers
  static constexpr bool kFetchBias = kSmall && kModified;  // threads read a bias before the product that hides the way to it
  static constexpr bool kFewApart =
      kSmall && !kModified && kHeadDim > 48;                  // a last key tile of very few keys goes its own, shorter way
  static constexpr bool kAlikeApart = !kSmall && !kModified;  // tiles that are alike are scheduled by code of their own
  // Masks that are the same for all rows are read by a warp together. NOTE: short instances lose the registers for their products
  // by it.
  static constexpr bool kVotesOnMasks = !kModified && !kSmall;
  // The output leaves through the buffer in which the tile's queries stood, unless that would keep the next queries waiting
  // (there is one such buffer) and shared memory has room for buffers of its own (wide heads).
  static constexpr bool kOwnOutput = kQueryStages == 1 && !kModified && kHeadDim > 128;
  static constexpr bool kStoreWarp = !kSmall && !kOwnOutput;  // a producer warp copies the output; else the consumers do it

  // Registers of a thread.
  static constexpr int kEntryRegisters = registers_at_entry(kThreads, kBlocksPerSm);
  static constexpr int kProducerRegisters = kSmall ? kEntryRegisters : kWarpgroups == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kSmall ? kEntryRegisters : kWarpgroups == 2 ? 232 : kWarpgroups == 3 ? 160 : 112;
  static constexpr int kOperandRegisters =  // O, S, P, part of Q, and the bias
      kHeadDim / 2 + kTileN / 2 + kTileN / 4 + 4 * kQuerySteps + (kFetchBias ? kTileN / 4 : 0);
  static constexpr int kOtherRegisters = 32;  // addresses, ring positions, references and sums of two rows
  static_assert(kSmall || kProducerRegisters + kWarpgroups * kConsumerRegisters <= (1 + kWarpgroups) * kEntryRegisters,
                "setmaxnreg hands registers from one warpgroup to another; consumers can't get more than producers give.");
  static_assert(kOperandRegisters + kOtherRegisters <= kConsumerRegisters,
                "Operands that don't fit into registers are spilled, and the compiler then runs the products one after another.");
};

}  // namespace fa::prefill_sm90
