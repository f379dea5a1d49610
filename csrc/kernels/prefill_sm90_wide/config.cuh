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

/// What the host hands to the kernel. Maps: boxes of 64 rows (query, out), 32 keys and 16 values, and 64 columns.
struct KernelArgs : prefill_sm90::KernelArgs {
  int num_splits;         // of the keys
  bool may_spoil_rows;    // see common/spoilt_rows.h
  bool over_grid;         // each cluster is one pair of blocks; else it has one for each split, and merges their outputs
  float* partial_out;     // [num_splits, B, H_q, S_q, D_v] (combine.h); where over_grid
  float2* partial_state;  // [num_splits, B, H_q, S_q]
};

template <class T_, bool kModified_>
struct Config {
  using T = T_;
  static constexpr bool kModified = kModified_;
  static constexpr int kTileM = kPairRows;  // query rows of two blocks
  static constexpr int kTileN = kStepKeys;  // keys of a step, half of them for each warpgroup's scores
  static constexpr bool kRowsBelowZero = false;
};

inline constexpr int kRows = kPairRows / 2;       // query rows of a block
inline constexpr int kKeys = kStepKeys / 2;       // keys of a step whose scores are one warpgroup's
inline constexpr int kPanels = kMaxHeadDim / 64;  // of 64 columns, 128 bytes
inline constexpr int kColumns = kMaxHeadDim / 2;  // of the output that are one warpgroup's
inline constexpr int kPanelBytes = kRows * 128;   // of queries, weights and output

/// What the pieces shared with prefill_sm90 have to know of a warpgroup: its part of a step's keys, and of the output's columns,
/// all of them or what is left to it of those that it shares with other blocks.
template <class C, int kColumns_ = kColumns>
struct Part {
  using T = typename C::T;
  static constexpr bool kModified = C::kModified, kVotesOnMasks = !kModified, kStagedOnly = false, kRowsBelowZero = false;
  static constexpr int kTileM = kRows, kTileN = kKeys, kHeadDim = kColumns_;
};

// A slot of a warpgroup's ring: 64 keys x 64 columns of K, or 16 keys x 256 columns of V. One group of wgmma reads one slot.
inline constexpr int kSlotBytes = kKeys * 128;
inline constexpr int kSlotKeys = 16;                       // of values
inline constexpr int kValueSlots = kStepKeys / kSlotKeys;  // of a step
inline constexpr int kValuePanelBytes = kSlotKeys * 128;
inline constexpr int kSlots = 9;
static_assert(kSlotKeys * 2 * kColumns == kSlotBytes, "Slots of keys and of values have one size.");

inline constexpr int kConsumerThreads = 2 * kWarpgroupThreads;
inline constexpr int kThreads = kConsumerThreads + kWarpgroupThreads;
inline constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(2 * kConsumerRegisters + kProducerRegisters <= 3 * prefill_sm90::registers_at_entry(kThreads, 1),
              "setmaxnreg hands registers from one warpgroup to another; consumers can't get more than producers give.");

/// Named barriers (0 is __syncthreads). Arrivals: all threads of both consumer warpgroups, or of one.
enum NamedBarrier : int {
  kMaximaThere = 1,   // both: the maxima of a step's scores are in `top`
  kWeightsFree = 2,   // both: no product reads the last step's weights any longer
  kWeightsThere = 3,  // both: this step's weights are in `weights`
  kSumsThere = 4,     // both: the sums of all keys are in `sum`; no product reads queries, keys or values any longer
  kOneWarpgroup = 5,  // and 6: its threads alone
};

struct alignas(1024) SharedMemory {
  uint8_t query[kPanels][kPanelBytes];  // later the output
  uint8_t ring[2][kSlots][kSlotBytes];  // later the output of the block's share of the keys, for other blocks to read
  uint8_t weights[2][kPanelBytes];      // by the warpgroup that made them
  Mbarrier<1> full[2][kSlots];          // a warpgroup's slot is there: its producer, and the bytes of both blocks' copies
  Mbarrier<8> empty[2][kSlots];         // it may be written again: the warps of that warpgroup in both blocks
  Mbarrier<1> query_full;
  float top[2][2][kRows];  // maxima by step % 2 (one may still be read when the next is written), warpgroup and row
  float sum[2][kRows];     // by warpgroup
  float2 state[kRows];     // reference and sum of the block's share of the keys, for other blocks to read
  Tile tile;
  RowsView view;
  int longest_first[32];  // sequences
};
static_assert(sizeof(SharedMemory) <= kSharedLimit, "plan() asks the device for kSharedLimit bytes.");

}  // namespace fa::prefill_sm90_wide
