// SPDX-License-Identifier: Apache-2.0
// The tiles and the shared memory of the kernel for the gradient of a bias, and the barriers by which its roles hand over.
//
// Roles: "load" is the lane that lists visits and starts copies into shared memory, "consume" each of the two warpgroups that
// multiply.
//
//   barrier      who arrives, and so ends a phase   who waits   what the phase's end says
//   visit_full   load                               consume     the visit can be read
//   visit_empty  consume                            load        nobody reads it any more
//   pair_full    the copy engine                    consume     Q and K, or dO and V, are there
//   pair_empty   consume                            load        their buffer may be filled again
//   bias_full    the copy engine                    consume     the tile of the bias is there
//   bias_empty   consume                            load        its buffer may be filled again
#pragma once

#include <cstdint>

#include "kernels/backward_sm90/bias_args.h"
#include "kernels/common/mbarrier.cuh"
#include "kernels/common/warpgroup.cuh"

namespace fa::backward_sm90 {

inline constexpr int kVisitSlots = 4;

/// The tile of scores of one head of one batch entry that is added to a tile of d_bias.
struct alignas(16) Visit {
  int valid;        // 0: there are no more
  int batch, head;  // of query
  int first_row, first_key;
  int32_t kv_length;
  RowBand band;
  bool begins, ends;  // the first, the last of its tile
  bool has_products;  // some row sees a key; else the tile is 0, and its only visit
  bool hides;         // some row doesn't see all keys
};

template <typename T_, int kHeadDim_>
struct BiasGradientTraits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;  // 64 or 128; the copy engine pads narrower heads with zeros
  static constexpr int kTile = 128;           // rows and keys of a tile: 64 rows of each warpgroup
  static constexpr int kWarpgroups = 2;
  static constexpr int kPanels = kHeadDim / 64;  // of 64 columns, 128 bytes
  static constexpr uint32_t kPanelBytes = kTile * 128, kTileBytes = kPanels * kPanelBytes;
  static constexpr int kPairs = kHeadDim == 64 ? 4 : 2;  // buffers, each for two tiles
  static constexpr int kBiasPanels = kTile / 64, kBiasStages = 2;
  static constexpr int kConsumerThreads = kWarpgroups * kWarpgroupThreads, kThreads = kConsumerThreads + kWarpgroupThreads;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
};

template <class C>
struct BiasGradientPlan {
  struct Pair {
    uint8_t of_rows[C::kTileBytes], of_keys[C::kTileBytes];
  };
  alignas(1024) Pair pair[C::kPairs];
  alignas(1024) uint8_t bias[C::kBiasStages][C::kBiasPanels * C::kPanelBytes];
  Mbarrier<1> visit_full[kVisitSlots], pair_full[C::kPairs], bias_full[C::kBiasStages];
  Mbarrier<C::kConsumerThreads> visit_empty[kVisitSlots], bias_empty[C::kBiasStages];
  Mbarrier<C::kConsumerThreads / 32> pair_empty[C::kPairs];
  Visit visit[kVisitSlots];

  /// For one thread; a block barrier must follow.
  __device__ __forceinline__ void init() {
    init_ring(visit_full, visit_empty);
    init_ring(pair_full, pair_empty);
    init_ring(bias_full, bias_empty);
    mbarrier_init_fence();
  }
};

}  // namespace fa::backward_sm90
