// SPDX-License-Identifier: Apache-2.0
#include "kernels/decode_splitkv/decode_splitkv.h"

#include <algorithm>

#include "kernels/combine/combine.h"
#include "kernels/prefill_sm80/instance.h"
#include "kernels/prefill_sm80/tile_grid.h"

namespace fa::decode_splitkv {
namespace {

constexpr int64_t kMaxRows = 64;           // (query row, head) pairs of a key head; more is work for prefill
constexpr int64_t kMinKeysPerSplit = 128;  // below, merging costs more than the keys
constexpr int64_t kBlocksPerSm = 5;        // one warp each: enough copies under way to fill the memory's latency

int64_t rows_per_key_head(const AttentionParams& p) { return p.query.shape[2] * (p.query.shape[1] / p.key.shape[1]); }

/// From shapes and the device only, so that results never depend on what else runs.
int64_t num_splits(const AttentionParams& p, const DeviceInfo& device, const TileInstance& instance) {
  const int64_t tiles = (rows_per_key_head(p) + instance.tile().tile_q() - 1) / instance.tile().tile_q();
  const int64_t blocks = std::max<int64_t>(1, tiles * p.key.shape[1] * p.query.shape[0]);
  return std::clamp<int64_t>(device.num_sms * kBlocksPerSm / blocks, 1, std::max<int64_t>(1, p.key.shape[2] / kMinKeysPerSplit));
}

int64_t num_rows(const AttentionParams& p) { return p.query.shape[0] * p.query.shape[1] * p.query.shape[2]; }

}  // namespace

std::string supports(const AttentionParams& params, const DeviceInfo& device) {
  if (params.cu_seqlens_q.present) return "packed sequences (cu_seqlens) are for prefill";
  if (rows_per_key_head(params) > kMaxRows) {
    return "seqlen_q times the query heads of a key head is " + std::to_string(rows_per_key_head(params)) +
           ", for decoding at most " + std::to_string(kMaxRows);
  }
  return why_not(params, device, find_instance(params, Variant::kSplit));
}

size_t workspace_bytes(const AttentionParams& params, const DeviceInfo& device) {
  const int64_t splits = num_splits(params, device, *find_instance(params, Variant::kSplit));
  return splits == 1 ? 0 : static_cast<size_t>(splits * num_rows(params) * (params.value.shape[3] + 2)) * sizeof(float);
}

/// A bound of splits * rows: the splits are bounded by the keys, and blocks * splits by the device, a block having tile_q rows.
size_t max_workspace_bytes(const AttentionParams& largest, const DeviceInfo& device) {
  const TileInstance* instance = find_instance(largest, Variant::kSplit);
  if (instance == nullptr || largest.cu_seqlens_q.present) return 0;
  const int64_t max_splits = largest.key.shape[2] / kMinKeysPerSplit;
  const int64_t max_rows = std::min(num_rows(largest), kMaxRows * largest.key.shape[1] * largest.query.shape[0]);
  const int64_t partial_rows = std::min(max_splits * max_rows, device.num_sms * kBlocksPerSm * instance->tile().tile_q());
  return static_cast<size_t>(partial_rows * (largest.value.shape[3] + 2)) * sizeof(float);
}

Status launch(const AttentionParams& params, const ExecutionContext& context) {
  const TileInstance& instance = *find_instance(params, Variant::kSplit);
  TileGrid grid{};
  grid.num_splits = static_cast<int>(num_splits(params, context.device, instance));
  if (grid.num_splits > 1) {
    const int64_t rows = grid.num_splits * num_rows(params);
    grid.partial_state = static_cast<float2*>(context.workspace);
    grid.partial_out = reinterpret_cast<float*>(grid.partial_state + rows);
  }
  if (Status status = launch_instance(instance, params, grid, context); !status.ok()) return status;
  return grid.num_splits > 1 ? combine({grid.partial_out, grid.partial_state, grid.num_splits}, params, context) : Status{};
}

}  // namespace fa::decode_splitkv
