// SPDX-License-Identifier: Apache-2.0
// The tiles of prefill_sm90_wide, and into how many parts the keys are split. Used by the host and by config.cuh.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fa/attention.h"
#include "kernels/prefill_sm90/shape.h"

namespace fa::prefill_sm90_wide {

using prefill_sm90::kSharedLimit;

inline constexpr int kMaxHeadDim = 512;
inline constexpr int kMinPanels = 5;   // of 64 columns of queries and keys; narrower heads (of wide values) are padded with zeros
inline constexpr int kPairRows = 128;  // query rows of two blocks, which share each key and value that is read
inline constexpr int kStepKeys = 128;

/// How pairs of blocks share a tile where there are few tiles. In the first two ways each pair has a part of the keys, and the
/// outputs are merged at the end: kMerged: inside a cluster; kOverGrid: by combine(), in device memory. kSharedSteps: each pair
/// of a cluster has a part of each step's keys and of the output's columns, and they exchange maxima and weights at each step,
/// which takes less time where there are few steps.
enum class Way : uint8_t { kMerged, kOverGrid, kSharedSteps };

/// Among how many pairs a tile is split, so that the device ends first.
struct Splits {
  int count = 1;
  Way way = Way::kMerged;
};

inline constexpr int kMaxInCluster = 4;  // so that a cluster has at most 8 blocks, which every GPU can place
inline constexpr int kMaxOverGrid = 8;   // … and only while all parts run at once, which bounds their workspace

/// Query rows of all heads.
inline int64_t num_rows(const AttentionParams& p) { return p.query.shape[0] * p.query.shape[1] * p.query.shape[2]; }

inline size_t workspace_bytes(const AttentionParams& p, const Splits& splits) {
  return splits.way == Way::kOverGrid ? static_cast<size_t>(splits.count * num_rows(p) * (p.value.shape[3] + 2)) * sizeof(float)
                                      : 0;
}

/// A plan's instance says how the parts of a tile come together, too.
inline int plan_instance(int instance, const Splits& splits) { return 3 * instance + static_cast<int>(splits.way); }
inline int instance_of(const Plan& plan) { return plan.instance / 3; }
inline Way way_of(const Plan& plan) { return static_cast<Way>(plan.instance % 3); }

/// What a way takes, in units of 33.4 nanoseconds on an H200; measured (docs/kernels.md).
struct Cost {
  int64_t step, start_and_end;
};

inline Cost cost_of(const Splits& splits) {
  if (splits.count == 1) return {106, 180};
  if (splits.way == Way::kOverGrid) return {100, 240};
  if (splits.way == Way::kSharedSteps) return splits.count == 2 ? Cost{120, 150} : Cost{185, 100};
  return splits.count == 2 ? Cost{106, 252} : Cost{106, 332};
}

/// The time of a problem, in the same unit.
inline int64_t predicted_time(const AttentionParams& p, const Device& device, const Splits& splits) {
  const int64_t tiles = prefill_sm90::num_tiles(p, kPairRows), pairs = std::max(device.num_sms / 2, 1);
  const bool over_grid = splits.way == Way::kOverGrid;
  const Cost cost = cost_of(splits);
  // NOTE: larger clusters leave some multiprocessors of a GPC without work.
  const int64_t slots = over_grid || splits.count == 1 ? pairs : std::max<int64_t>((pairs - 6) / splits.count, 1);
  const auto part = [&](int64_t keys) {
    const int64_t steps = (keys + kStepKeys - 1) / kStepKeys;
    return (steps + splits.count - 1) / splits.count * cost.step + cost.start_and_end;
  };
  const int64_t units = tiles * (over_grid ? splits.count : 1), combine = over_grid ? 350 + units * 15 / 2 : 0;
  const int64_t rounds = (units + slots - 1) / slots;
  return std::max(rounds * part(prefill_sm90::mean_keys(p)), part(p.key.shape[2])) + combine;
}

inline Splits choose_splits(const AttentionParams& p, const Device& device) {
  Splits best;
  int64_t best_time = predicted_time(p, device, best);
  const auto consider = [&](const Splits& splits) {
    const int64_t time = predicted_time(p, device, splits);
    if (time < best_time) best = splits, best_time = time;
  };
  const int64_t steps = (p.key.shape[2] + kStepKeys - 1) / kStepKeys;
  for (int count = 2; count <= kMaxInCluster; count *= 2) {
    consider({count, Way::kSharedSteps});
    if (count <= steps) consider({count, Way::kMerged});
  }
  const int64_t at_once = device.num_sms / 2 / std::max<int64_t>(prefill_sm90::num_tiles(p, kPairRows), 1);
  const int64_t most_over_grid = p.cu_seqlens_q.present ? 0 : std::min<int64_t>({steps, kMaxOverGrid, at_once});
  for (int count = 2; count <= most_over_grid; ++count) consider({count, Way::kOverGrid});
  return best;
}

}  // namespace fa::prefill_sm90_wide
