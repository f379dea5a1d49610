// SPDX-License-Identifier: Apache-2.0
// The shapes of one instantiation of prefill_sm90 and the shared memory it plans. Used by kernel.cuh and launch.cuh.
#pragma once

#include <cstdint>

#include "kernels/common/mbarrier.cuh"
#include "kernels/common/warpgroup.cuh"
#include "kernels/prefill_sm90/args.h"
#include "kernels/prefill_sm90/shape.h"

namespace fa::prefill_sm90 {

template <typename T_, Variant kVariant, int kHeadDim_, int kWarpgroups_, int kTileN_, int kStages_, int kQueryStages_,
          int kBiasStages_ = 0, bool kPingPong_ = true, int kBlocksPerSm_ = 1, int kQuerySteps_ = 0>
struct Config {
  using T = T_;
  static constexpr bool kModified = kVariant == Variant::kModified || kVariant == Variant::kModifiedTall;
  static constexpr bool kStagedOnly = kVariant == Variant::kModifiedTall;  // no mask, and no bias but by the copy engine
  static constexpr int kHeadDim = kHeadDim_;        // multiple of 16; narrower heads are padded by the copy engine's zero fill
  static constexpr int kWarpgroups = kWarpgroups_;  // that multiply
  static constexpr int kTileM = kRowsUnit * kWarpgroups;  // query rows of a tile
  static constexpr bool kRowsBelowZero = kTileM > 64;     // a sequence's first tile may begin before it
  static constexpr int kTileN = kTileN_;                  // keys of a tile
  static constexpr int kStages = kStages_;                // buffers for K, and as many for V
  static constexpr int kQueryStages = kQueryStages_;      // buffers for Q
  static constexpr int kBiasStages = kBiasStages_;        // buffers for tiles of a 16-bit bias; 0: read from device memory
  static constexpr bool kPingPong = kPingPong_;           // warpgroups issue their products in turn
  static constexpr int kQuerySteps = kQuerySteps_;        // times 16 columns of Q that consumers keep in registers
  static constexpr int kPanels = (kHeadDim + 63) / 64;    // of 64 columns, 128 bytes
  static constexpr int kBiasPanels = (kTileN + 63) / 64;
  static constexpr bool kSmall = kWarpgroups == 1;            // no registers are moved, and one warp does not multiply, else four
  static constexpr bool kFewApart = kSmall && kHeadDim > 48;  // a last key tile of very few keys goes its own, shorter way
  static constexpr int kConsumerThreads = kWarpgroupThreads * kWarpgroups;
  static constexpr int kThreads = kConsumerThreads + (kSmall ? 32 : kWarpgroupThreads);
  static constexpr int kBlocksPerSm = kBlocksPerSm_;  // what registers and shared memory are planned for
  // The output leaves through the queries' memory. Where that is all there is, next to keys and values, and some is left, it has
  // its own, so that the next queries come early.
  static constexpr bool kOwnOutput = kQueryStages == 1 && !kModified && kHeadDim > 128;
  static constexpr bool kStoreWarp = !kSmall && !kOwnOutput;  // output is copied by a warp that doesn't multiply, else by its own
  static constexpr int kProducerRegisters = kWarpgroups == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kWarpgroups == 2 ? 232 : kWarpgroups == 3 ? 160 : 112;
  static constexpr uint32_t kQueryBytes = kTileM * 128 * kPanels;
  static constexpr uint32_t kKeyBytes = kTileN * 128 * kPanels;
  static constexpr uint32_t kBiasBytes = kTileM * 128 * kBiasPanels;
  static_assert(kHeadDim % 16 == 0 && kTileN % 16 == 0);
  static_assert(kModified || kBiasStages == 0);
};

inline constexpr int kFewInLast = 16;
inline constexpr int kTileSlots = 2;
inline constexpr int kTurnBarrier = 1;       // named barriers 1 … 4: the warpgroup's turn to issue products
inline constexpr int kWarpgroupBarrier = 5;  // 5 … 8: the threads of one consumer warpgroup
inline constexpr int kStartBarrier = 9;      // all threads of the block, once

template <class C>
struct SharedMemory {
  alignas(1024) uint8_t query[C::kQueryStages][C::kQueryBytes];
  alignas(1024) uint8_t key[C::kStages][C::kKeyBytes];
  alignas(1024) uint8_t value[C::kStages][C::kKeyBytes];
  alignas(1024) uint8_t out[C::kOwnOutput ? C::kWarpgroups : 1][2][C::kOwnOutput ? 64 * 128 : 16];
  alignas(1024) uint8_t bias[C::kBiasStages > 0 ? C::kBiasStages * C::kBiasBytes : 16];
  uint64_t query_full[C::kQueryStages], query_empty[C::kQueryStages];
  uint64_t key_full[C::kStages], key_empty[C::kStages];
  uint64_t value_full[C::kStages], value_empty[C::kStages];
  uint64_t bias_full[C::kBiasStages + 1], bias_empty[C::kBiasStages + 1];
  uint64_t tile_full[kTileSlots], tile_empty[kTileSlots], tile_wanted;
  uint64_t last_value_full[kTileSlots];                // a tile's last values are there, but for clear_values
  uint64_t out_full[C::kQueryStages][C::kWarpgroups];  // output stands where the queries were; for store_tiles
  Tile tile[kTileSlots];
  RowsView view[kTileSlots][C::kWarpgroups];
  int longest_first[32];  // sequences, for the warp that schedules
};

/// Zeros in rows used … kTileN - 1 of a tile of values, by `num_threads` threads, for the tensor cores to read.
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

/// From here on the barriers of init_barriers are there. Once, for all threads.
template <class C>
__device__ __forceinline__ void wait_for_barriers() {
  named_barrier_sync(kStartBarrier, C::kThreads);
}

}  // namespace fa::prefill_sm90
