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

/// Into how many parts the keys are split, so that the device ends first, and whether the parts of a tile are merged inside a
/// cluster or, by combine(), in device memory.
struct Splits {
  int count = 1;
  bool over_grid = false;
};

inline constexpr int kMaxInCluster = 4;  // so that a cluster has at most 8 blocks, which every GPU can place
inline constexpr int kMaxOverGrid = 8;   // … and only while all parts run at once, which bounds their workspace

/// Query rows of all heads.
inline int64_t num_rows(const AttentionParams& p) { return p.query.shape[0] * p.query.shape[1] * p.query.shape[2]; }

inline size_t workspace_bytes(const AttentionParams& p, const Splits& splits) {
  return splits.over_grid ? static_cast<size_t>(splits.count * num_rows(p) * (p.value.shape[3] + 2)) * sizeof(float) : 0;
}

/// A plan's instance says where the parts of a tile are merged, too.
inline int plan_instance(int instance, const Splits& splits) { return 2 * instance + (splits.over_grid ? 1 : 0); }
inline int instance_of(const Plan& plan) { return plan.instance / 2; }
inline bool splits_over_grid(const Plan& plan) { return plan.instance % 2 != 0; }

/// The time of a problem, in tenths of a step; its constants are measured (docs/kernels.md).
inline int64_t predicted_time(const AttentionParams& p, const Device& device, const Splits& splits) {
  const int64_t tiles = prefill_sm90::num_tiles(p, kPairRows), pairs = std::max(device.num_sms / 2, 1);
  const int64_t start_and_end = splits.over_grid || splits.count == 1 ? 24 : splits.count == 2 ? 31 : 37;
  // NOTE: larger clusters leave some multiprocessors of a GPC without work.
  const int64_t slots = splits.over_grid || splits.count == 1 ? pairs : std::max<int64_t>((pairs - 6) / splits.count, 1);
  const auto part = [&](int64_t keys) {
    const int64_t steps = (keys + kStepKeys - 1) / kStepKeys;
    return (steps + splits.count - 1) / splits.count * 10 + start_and_end;
  };
  const int64_t units = tiles * (splits.over_grid ? splits.count : 1), combine = splits.over_grid ? 35 + units * 3 / 4 : 0;
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
  for (int count = 2; count <= std::min<int64_t>(steps, kMaxInCluster); count *= 2) consider({count, false});
  const int64_t at_once = device.num_sms / 2 / std::max<int64_t>(prefill_sm90::num_tiles(p, kPairRows), 1);
  const int64_t most_over_grid = p.cu_seqlens_q.present ? 0 : std::min<int64_t>({steps, kMaxOverGrid, at_once});
  for (int count = 2; count <= most_over_grid; ++count) consider({count, true});
  return best;
}

}  // namespace fa::prefill_sm90_wide
