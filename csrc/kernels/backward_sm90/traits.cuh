// SPDX-License-Identifier: Apache-2.0
// Everything about one instance of backward_sm90 that is known at compile time. Every template of the kernel takes one Traits,
// by the name C.
#pragma once

#include <cstdint>

#include "kernels/backward_sm90/instances.h"
#include "kernels/common/warpgroup.cuh"

namespace fa::backward_sm90 {

template <typename T_, int kHeadDim_, Variant kVariant>
struct Traits {
  using T = T_;
  static constexpr Variant kOfVariant = kVariant;
  static constexpr bool kHasBias = kVariant == Variant::kBias, kPacked = kVariant == Variant::kPacked;
  static constexpr int kBlocks = 1;                             // that have an item together
  static constexpr int kHeadDim = kHeadDim_;                    // 64 or 128; the copy engine pads narrower heads with zeros
  static constexpr int kWarpgroups = 2;                         // that multiply
  static constexpr int kTileN = kTileKeys;                      // keys: 64 of each warpgroup
  static constexpr int kTileM = tile_rows(kHeadDim, kVariant);  // query rows
  static constexpr int kPanels = kHeadDim / 64;                // of 64 columns, 128 bytes: the widest rows that the swizzle takes
  static constexpr int kPartElements = kTileM * kHeadDim / 2;  // of a tile's d_query, in the hands of a warpgroup

  // 80 rows are no whole number of accumulators, so there dQ^T = K^T dS^T is computed. So many scores leave registers for both P
  // and dS only if dV is issued behind dS.
  static constexpr bool kTransposed = kVariant == Variant::kTall;

  // A tile's dQ goes through shared memory, whence the copy engine adds it to its sum: additions from registers take a consumer
  // 300 to 600 clocks to issue, and its turn must have come. With a bias consumers still add from registers.
  static constexpr bool kStaged = !kHasBias;

  static constexpr int kStages = kStaged && kTileM > 64 ? 2 : 3;  // buffers for tiles of Q, and as many for dO
  // Buffers for tiles of K, and as many for V. With two, an item's first S^T is computed beside the last products of the item
  // before and the stores of its gradients.
  static constexpr int kKeyStages = kStaged && kHeadDim <= 64 ? 2 : 1;
  static constexpr uint32_t kQueryBytes = kTileM * 128 * kPanels;
  static constexpr uint32_t kKeyBytes = kTileN * 128 * kPanels;
  static constexpr uint32_t kRowBytes = kTileM * sizeof(float);  // of a number for each row of a tile

  static constexpr int kConsumerWarps = 4 * kWarpgroups, kConsumerThreads = 32 * kConsumerWarps;
  static constexpr int kThreads = kConsumerThreads + kWarpgroupThreads;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
};

/// For heads of up to 256 columns. Two blocks, a pair, have an item together: each takes P and dS of 64 keys, and hands them to
/// the other, and the gradients of one half of the columns.
template <typename T_>
struct PairTraits {
  using T = T_;
  static constexpr bool kHasBias = false, kPacked = false, kStaged = false;
  static constexpr int kBlocks = 2;
  static constexpr int kHeadDim = 256, kHalfDim = 128;  // the copy engine pads narrower heads with zeros
  static constexpr int kWarpgroups = 2;
  static constexpr int kTileN = kTileKeys, kBlockN = 64;  // keys of the pair and of a block
  static constexpr Variant kOfVariant = Variant::kPlain;
  static constexpr int kTileM = tile_rows(kHeadDim, kOfVariant);
  static constexpr int kPanels = 4, kHalfPanels = 2;
  static_assert(kTileM == 64 && kTileN == 2 * kBlockN);
  static constexpr int kPartElements = 64 * 64;  // of a tile's d_query, in the hands of a warpgroup

  static constexpr int kStages = 2;  // buffers for a block's half of the columns of Q, and as many for dO; one for the other half
  static constexpr uint32_t kPanelBytes = 64 * 128;
  static constexpr uint32_t kHalfBytes = kHalfPanels * kPanelBytes, kKeyBytes = kPanels * kPanelBytes;
  static constexpr uint32_t kRowBytes = kTileM * sizeof(float);  // of a number for each row of a tile

  static constexpr int kConsumerWarps = 4 * kWarpgroups, kConsumerThreads = 32 * kConsumerWarps;
  static constexpr int kThreads = kConsumerThreads + kWarpgroupThreads;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
};

}  // namespace fa::backward_sm90
