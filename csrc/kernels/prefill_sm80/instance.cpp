// SPDX-License-Identifier: Apache-2.0
// Chooses an instance of the sm_80 kernel and lays out its grid: which tiles run side by side, so that their keys and values stay
// in L2 and the longest start first.
#include "kernels/prefill_sm80/instance.h"

#include <algorithm>
#include <limits>
#include <string>

#include "dispatch.h"
#include "kernels/common/aligned_rows.h"
#include "kernels/common/launch.h"
#include "kernels/common/smallest_instance.h"
#include "kernels/common/spoilt_rows.h"
#include "kernels/prefill_sm80/instances.h"
#include "kernels/prefill_sm80/tile_grid.h"

namespace fa::prefill_sm80 {
namespace {

constexpr int64_t kL2BytesForKeys = int64_t{24} << 20;  // of an A100's 40 and an H100's 50 MB

const TileInstance kInstances[] = {
#define FA_INSTANCE(T, dtype, head_dim, variant) {dtype, head_dim, Variant::variant, launch_tiles<T, head_dim, Variant::variant>},
#include "kernels/prefill_sm80/instances.def"
#undef FA_INSTANCE
};

/// Rows of mask or bias: neighbouring keys are neighbours in memory, and eight of them make aligned accesses of at most 16 bytes.
bool has_vectors(const TensorView& view) {
  return view.shape[3] >= 8 && view.stride[3] == 1 && rows_aligned_to(view, std::min<int64_t>(16, 8 * size_of(view.dtype)));
}

/// How many (batch, head) pairs run together.
int64_t pairs_in_l2(const AttentionParams& p, int64_t pairs, int64_t query_heads_per_pair) {
  const int64_t heads_per_key_head = p.query.shape[1] / p.key.shape[1] / query_heads_per_pair;
  return std::clamp<int64_t>(key_heads_in(kL2BytesForKeys, p) * heads_per_key_head, std::min(pairs, heads_per_key_head), pairs);
}

/// The widest heads of the type and variant.
int widest(DType dtype, Variant variant) {
  int head_dim = 0;
  for (const TileInstance& instance : kInstances) {
    if (instance.dtype == dtype && instance.variant == variant) head_dim = std::max(head_dim, instance.head_dim);
  }
  return head_dim;
}

}  // namespace

const TileInstance* find_instance(const AttentionParams& params, Variant variant) {
  return smallest_instance(kInstances, params, [&](const TileInstance& instance) {
    return instance.dtype == params.query.dtype && instance.variant == variant;
  });
}

bool plan_instance(const AttentionParams& params, Variant variant, Plan* plan, std::string* why_not) {
  constexpr int64_t kMaxRows = int64_t{1} << 29;  // RowBand: sums of two positions fit 32 bits
  const int capability = plan->device.compute_capability, shared_bytes = plan->device.shared_memory_bytes;
  FA_REFUSE_IF(capability < 80, "needs compute capability 8.0 or newer, the device has " + std::to_string(capability / 10) + "." +
                                    std::to_string(capability % 10));
  FA_REFUSE_IF(params.query.dtype == DType::kFloat8E4M3,
               "takes float32, float16 and bfloat16 only, the tensors are float8_e4m3fn");
  const TileInstance* instance = find_instance(params, variant);
  FA_REFUSE_IF(instance == nullptr, "head_dim " + std::to_string(std::max(params.query.shape[3], params.value.shape[3])) +
                                        " is above " + std::to_string(widest(params.query.dtype, variant)));
  FA_REFUSE_IF(params.query.shape[2] > kMaxRows || params.key.shape[2] > kMaxRows, "more than 2^29 rows or keys");
  FA_REFUSE_IF(instance->shared_bytes() > shared_bytes, "needs " + std::to_string(instance->shared_bytes()) +
                                                            " bytes of shared memory in a thread block, the device gives " +
                                                            std::to_string(shared_bytes));
  plan->instance = static_cast<int>(instance - kInstances);
  return true;
}

const TileInstance& instance_of(const Plan& plan) { return kInstances[plan.instance]; }

Status launch_instance(const Plan& plan, const AttentionParams& params, TileGrid grid, const ExecutionContext& context) {
  const TileInstance& instance = instance_of(plan);
  const TileShape tile = instance.tile();
  const int64_t group_size = params.query.shape[1] / params.key.shape[1];
  const bool share_tile = instance.variant == Variant::kSplit, packed = params.cu_seqlens_q.present;
  const int64_t sequences = num_spans(params), heads = share_tile ? params.key.shape[1] : params.query.shape[1];
  const int64_t rows = params.query.shape[2] * (share_tile ? group_size : 1), pairs = packed ? heads : heads * sequences;
  const int64_t row_tiles = packed ? rows / tile.tile_q() + sequences : (rows + tile.tile_q() - 1) / tile.tile_q();
  const int64_t blocks = pairs * row_tiles;
  if (blocks == 0 || rows == 0) return {};
  if (blocks > std::numeric_limits<int32_t>::max()) {
    return {StatusCode::kUnsupported,
            "The problem has " + std::to_string(blocks) + " tiles of rows, at most 2^31 - 1 can be launched."};
  }
  grid.sequences = sequence_rule(params);
  grid.num_spans = static_cast<int>(sequences);
  grid.group_size = Divisor(group_size);
  const int64_t group = pairs_in_l2(params, pairs, share_tile ? group_size : 1);
  grid.order = TileOrder(packed ? 1 : sequences, heads, row_tiles, group, group, batch_shares_bias(params));
  grid.query_by_16 = is_by(params.query, 16);
  grid.key_by_16 = is_by(params.key, 16);
  grid.value_by_16 = is_by(params.value, 16);
  grid.out_by_16 = is_by(params.out, 16);
  grid.mask_by_8 = params.mask.present && has_vectors(params.mask);
  grid.bias_by_8 = params.bias.present && has_vectors(params.bias);
  grid.may_spoil_rows = may_spoil_rows(params);
  return cuda_status(instance.launch(params, grid, static_cast<unsigned>(blocks), static_cast<cudaStream_t>(context.stream)),
                     "The attention kernel could not be launched");
}

}  // namespace fa::prefill_sm80
