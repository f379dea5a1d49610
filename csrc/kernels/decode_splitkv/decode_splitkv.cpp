// SPDX-License-Identifier: Apache-2.0
#include "kernels/decode_splitkv/decode_splitkv.h"

#include <algorithm>

#include "dispatch.h"
#include "kernels/combine/combine.h"
#include "kernels/prefill_sm80/instance.h"
#include "kernels/prefill_sm80/tile_grid.h"

namespace fa::decode_splitkv {
namespace {

using prefill_sm80::find_instance;
using prefill_sm80::instance_of;
using prefill_sm80::TileGrid;
using prefill_sm80::TileInstance;
using prefill_sm80::Variant;

constexpr int64_t kMaxRows = 64;           // (query row, head) pairs of a key head; more is work for prefill
constexpr int64_t kMinKeysPerSplit = 128;  // below, merging costs more than the keys
constexpr int64_t kBlocksPerSm = 5;        // one warp each: enough copies under way to fill the memory's latency

int64_t rows_per_key_head(const AttentionParams& p) { return p.query.shape[2] * (p.query.shape[1] / p.key.shape[1]); }

/// From shapes and the device only, so that results never depend on what else runs.
int num_splits(const AttentionParams& p, const Device& device, const TileInstance& instance) {
  const int64_t tiles = (rows_per_key_head(p) + instance.tile().tile_q() - 1) / instance.tile().tile_q();
  const int64_t blocks = std::max<int64_t>(1, tiles * p.key.shape[1] * p.query.shape[0]);
  const int64_t most = std::max<int64_t>(1, p.key.shape[2] / kMinKeysPerSplit);
  return static_cast<int>(std::clamp<int64_t>(device.num_sms * kBlocksPerSm / blocks, 1, most));
}

int64_t num_rows(const AttentionParams& p) { return p.query.shape[0] * p.query.shape[1] * p.query.shape[2]; }

}  // namespace

bool plan(const AttentionParams& params, Plan* plan, std::string* why_not) {
  FA_REFUSE_IF(params.cu_seqlens_q.present, "packed sequences (cu_seqlens) are for prefill");
  FA_REFUSE_IF(rows_per_key_head(params) > kMaxRows, "seqlen_q times the query heads of a key head is " +
                                                         std::to_string(rows_per_key_head(params)) + ", for decoding at most " +
                                                         std::to_string(kMaxRows));
  if (!prefill_sm80::plan_instance(params, Variant::kSplit, plan, why_not)) return false;
  plan->num_splits = num_splits(params, plan->device, instance_of(*plan));
  FA_REFUSE_IF(plan->num_splits == 1 && params.query.shape[2] > instance_of(*plan).tile().tile_q(),
               "the keys need no splitting, and seqlen_q " + std::to_string(params.query.shape[2]) + " is more than a tile of " +
                   std::to_string(instance_of(*plan).tile().tile_q()) + " rows");
  if (plan->num_splits > 1) {
    plan->workspace_bytes =
        static_cast<size_t>(plan->num_splits * num_rows(params) * (params.value.shape[3] + 2)) * sizeof(float);
  }
  return true;
}

/// A bound of splits * rows: the splits are bounded by the keys, and blocks * splits by the device, a block having tile_q rows.
size_t max_workspace_bytes(const AttentionParams& largest, const Device& device) {
  const TileInstance* instance = find_instance(largest, Variant::kSplit);
  if (instance == nullptr || largest.cu_seqlens_q.present) return 0;
  const int64_t max_splits = largest.key.shape[2] / kMinKeysPerSplit;
  const int64_t max_rows = std::min(num_rows(largest), kMaxRows * largest.key.shape[1] * largest.query.shape[0]);
  const int64_t partial_rows = std::min(max_splits * max_rows, device.num_sms * kBlocksPerSm * instance->tile().tile_q());
  return static_cast<size_t>(partial_rows * (largest.value.shape[3] + 2)) * sizeof(float);
}

Status launch(const Plan& plan, const AttentionParams& params, const ExecutionContext& context) {
  TileGrid grid{};
  grid.num_splits = plan.num_splits;
  if (plan.num_splits > 1) {
    grid.partial_state = static_cast<float2*>(context.workspace);
    grid.partial_out = reinterpret_cast<float*>(grid.partial_state + plan.num_splits * num_rows(params));
  }
  if (Status status = prefill_sm80::launch_instance(plan, params, grid, context); !status.ok()) return status;
  return plan.num_splits > 1 ? combine({grid.partial_out, grid.partial_state, grid.num_splits}, params, context) : Status{};
}

}  // namespace fa::decode_splitkv
