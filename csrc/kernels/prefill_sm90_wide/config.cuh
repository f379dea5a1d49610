// SPDX-License-Identifier: Apache-2.0
// The shapes of prefill_sm90_wide, the shared memory it plans, its barriers and who arrives at them. Used by kernel.cuh and
// launch.cuh.
#pragma once

#include <cstdint>

#include "kernels/common/mbarrier.cuh"
#include "kernels/common/warpgroup.cuh"
#include "kernels/prefill_sm90/args.h"
#include "kernels/prefill_sm90/traits.cuh"
#include "kernels/prefill_sm90_wide/shape.h"

namespace fa::prefill_sm90_wide {

using prefill_sm90::RowsView;
using prefill_sm90::Tile;

/// What the host hands to the kernel. Maps: boxes of 64 rows (query, out), 32 keys and kBoxValues values, and 64 columns.
struct KernelArgs : prefill_sm90::KernelArgs {
  int num_splits;         // of the keys, each a pair's
  bool may_spoil_rows;    // see common/spoilt_rows.h
  bool over_grid;         // each cluster is one pair of blocks; else it has one for each split, and merges their outputs
  float* partial_out;     // [num_splits, B, H_q, S_q, D_v] (combine.h); where over_grid
  float2* partial_state;  // [num_splits, B, H_q, S_q]
};

inline constexpr int kRows = kPairRows / 2;       // query rows of a block
inline constexpr int kKeys = kStepKeys / 2;       // keys of a step whose scores are one warpgroup's
inline constexpr int kPanels = kMaxHeadDim / 64;  // of 64 columns, 128 bytes
inline constexpr int kPanelBytes = kRows * 128;   // of queries, weights and output
inline constexpr int kSlotBytes = kKeys * 128;
inline constexpr int kValueSlots = 8;  // of a step

inline constexpr int kConsumerThreads = 2 * kWarpgroupThreads;
inline constexpr int kThreads = kConsumerThreads + kWarpgroupThreads;

/// kPairs pairs of blocks, a cluster, share a tile of kPairRows rows: the keys of each step for the scores, the columns for the
/// output.
template <class T_, bool kModified_, int kPairs_>
struct Config {
  using T = T_;
  static constexpr bool kModified = kModified_;
  static constexpr int kPairs = kPairs_;
  static constexpr int kTileM = kPairRows;           // query rows of two blocks
  static constexpr int kTileN = kPairs * kStepKeys;  // keys of a step, kKeys of them for each warpgroup's scores
  static constexpr bool kRowsBelowZero = false;
  static constexpr int kFoldedWarpgroups = 1;  // tiles are of neighbouring rows

  static constexpr int kColumns = kMaxHeadDim / (2 * kPairs);  // of the output that are one warpgroup's
  // A slot of a warpgroup's ring: kKeys keys x 64 columns of K, or kSlotKeys keys x kColumns columns of V.
  static constexpr int kSlotKeys = kTileN / kValueSlots;
  static constexpr int kSlotPanels = kColumns / 64;
  static constexpr int kSlots = kPairs == 1 ? 9 : kPairs == 2 ? 8 : 6;
  static constexpr int kBoxValues =
      kSlotPanels > 1 ? kSlotKeys : kSlotKeys / 2;  // a block fetches half of the panels, or of the keys
  static_assert(kSlotKeys * 2 * kColumns == kSlotBytes, "Slots of keys and of values have one size.");

  static constexpr int kProducerRegisters = kPairs == 1 ? 40 : 72, kConsumerRegisters = kPairs == 1 ? 232 : 216;
  static_assert(2 * kConsumerRegisters + kProducerRegisters <= 3 * prefill_sm90::registers_at_entry(kThreads, 1),
                "setmaxnreg hands registers from one warpgroup to another; consumers can't get more than producers give.");
};

/// What the pieces shared with prefill_sm90 have to know of a warpgroup: its part of a step's keys, and of the output's columns,
/// all of them or what is left to it of those that it shares with other blocks.
template <class C, int kColumns = C::kColumns>
struct Part {
  using T = typename C::T;
  static constexpr bool kModified = C::kModified, kVotesOnMasks = !kModified, kStagedOnly = false, kRowsBelowZero = false;
  static constexpr int kTileM = kRows, kTileN = kKeys, kHeadDim = kColumns;
};

/// Named barriers (0 is __syncthreads). Arrivals: all threads of both consumer warpgroups, or of one.
enum NamedBarrier : int {
  kNumbersThere = 1,  // both: numbers of all rows are in `gathered`; where there is one pair
  kWeightsFree = 2,   // both: no product reads the last step's weights any longer; where there is one pair
  kWeightsThere = 3,  // both: this step's weights of both are in `weights`
  kOneWarpgroup = 4,  // and 5: its threads alone
};

/// All pairs' warpgroups are numbered in one: 2 * pair + warpgroup.
template <class C>
struct alignas(1024) SharedMemory {
  uint8_t query[kPanels][kPanelBytes];          // later the output
  uint8_t ring[2][C::kSlots][kSlotBytes];       // by warpgroup; later, for other blocks to read, the output of a split
  uint8_t weights[2 * C::kPairs][kPanelBytes];  // by the warpgroup that made them
  Mbarrier<1> full[2][C::kSlots];               // a warpgroup's slot is there: its producer, the bytes of both blocks' copies
  Mbarrier<8> empty[2][C::kSlots];              // it may be written again: the warps of that warpgroup in both blocks
  Mbarrier<1> query_full;
  Mbarrier<1> numbers_there;                 // in `gathered`: one thread, and the bytes from all pairs' warpgroups
  Mbarrier<1> weights_there[C::kPairs];      // of another pair: one thread, and the bytes
  Mbarrier<8 * C::kPairs> weights_free;      // no product reads the last step's: the warps of all pairs
  float gathered[2 * C::kPairs][kRows];      // maxima, at last sums, by warpgroup and row
  float2 state[C::kPairs == 1 ? kRows : 1];  // reference and sum of a split, for other blocks to read
  Tile tile;
  RowsView view;
  int longest_first[32];  // sequences
};

}  // namespace fa::prefill_sm90_wide
