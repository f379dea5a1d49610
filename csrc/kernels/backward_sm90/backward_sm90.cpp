// SPDX-License-Identifier: Apache-2.0
// Which problems the Hopper kernel of the backward pass takes, and the choice of its instance.
#include "kernels/backward_sm90/backward_sm90.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "dispatch.h"
#include "kernels/backward_sm90/instances.h"
#include "kernels/common/aligned_rows.h"
#include "kernels/common/bias_tiles.h"
#include "kernels/common/smallest_instance.h"
#include "kernels/common/tensor_map.h"

namespace fa::backward_sm90 {
namespace {

constexpr int64_t kMaxRows = int64_t{1} << 29;  // positions and sums of two fit 32 bits

struct Instance {
  DType dtype;
  int head_dim;  // bucket: the largest head_dim and head_dim_v it takes
  Variant variant;
  Status (*launch)(const BackwardPlan& plan, const AttentionParams& params, const Gradients& gradients,
                   const ExecutionContext& context);
};

const Instance kInstances[] = {
#define FA_INSTANCE(T, dtype, head_dim, variant) \
  {dtype, head_dim, Variant::variant, launch_instance<T, head_dim, Variant::variant>},
#include "kernels/backward_sm90/instances.def"
#undef FA_INSTANCE
};

/// About how many rows see a key, on average.
int64_t rows_of_key(const AttentionParams& p) {
  const int64_t rows = p.query.shape[2];
  if (p.window_left < 0 && p.window_right < 0) return rows;
  if (p.window_left < 0 || p.window_left >= rows || p.window_right < 0 || p.window_right >= rows) return rows / 2;
  return std::min(rows / 2, p.window_left + p.window_right);
}

/// Tall tiles where rows are so many that their fewer steps count for more than the last one, partly empty.
Variant variant_of(const AttentionParams& p) {
  constexpr int64_t kFewRows = 2048;
  if (p.bias.present) return Variant::kBias;
  if (p.cu_seqlens_q.present) return Variant::kPacked;
  const int64_t head_dim = std::max(p.query.shape[3], p.value.shape[3]);
  return head_dim > 64 && head_dim <= 128 && rows_of_key(p) > kFewRows ? Variant::kTall : Variant::kPlain;
}

const Instance* find_instance(const AttentionParams& p) {
  const Variant variant = variant_of(p);
  return smallest_instance(
      kInstances, p, [&](const Instance& instance) { return instance.dtype == p.query.dtype && instance.variant == variant; });
}

/// What the kernel does with scores: a scale, a bias, key lengths and windows, and no more.
bool suits_scores(const AttentionParams& p, std::string* why_not) {
  FA_REFUSE_IF(p.mask.present || p.alibi_slopes.present || p.softcap != 0.0f, "takes no mask, alibi_slopes and softcap");
  FA_REFUSE_IF(p.query_lengths.present, "takes no query_lengths");
  FA_REFUSE_IF(p.cu_seqlens_q.present && p.bias.present, "takes no bias of packed sequences");
  return true;
}

/// Biases that the copy engine brings, and gradients of them that are sums over whole tiles.
bool suits_bias(const AttentionParams& p, const Gradients& g, std::string* why_not) {
  if (!p.bias.present) return true;
  FA_REFUSE_IF(!bias_has_tiles(p),
               "takes a bias of query's dtype, with rows of its own that the copy engine (TMA) can address, and no other");
  FA_REFUSE_IF(p.bias.shape[3] != p.key.shape[2], "takes no bias that ends before the keys");
  if (!g.d_bias.present) return true;
  for (int axis = 0; axis < 2; ++axis) {
    FA_REFUSE_IF(is_summed(g.d_bias, axis) && bias_tensor(p.bias).shape[axis] > 1,
                 "computes no d_bias that is shared where the bias is not");
  }
  FA_REFUSE_IF(is_summed(g.d_bias, 2) || g.d_bias.stride[3] != 1 || !rows_aligned_to(g.d_bias, 2 * sizeof(float)),
               "writes d_bias by rows of their own that begin at multiples of 8 bytes, and no other");
  return true;
}

/// What the copy engine reads, and rows that are written 16 bytes at a time.
bool suits_memory(const AttentionParams& p, const Gradients& g, std::string* why_not) {
  const std::pair<const char*, const TensorView*> tensors[] = {
      {"query", &p.query},     {"key", &p.key},     {"value", &p.value},    {"d_out", &g.d_out},
      {"d_query", &g.d_query}, {"d_key", &g.d_key}, {"d_value", &g.d_value}};
  for (const auto& [name, tensor] : tensors) {
    FA_REFUSE_IF(tensor->empty(), std::string(name) + " has no elements");
    FA_REFUSE_IF(tensor->shape[2] > kMaxRows, "more than 2^29 rows or keys");
    FA_REFUSE_IF(!has_tensor_map(*tensor),
                 std::string("the copy engine (TMA) can't address ") + name + ", which " + tensor_map_obstacle(*tensor));
  }
  FA_REFUSE_IF(p.query.shape[3] % 8 != 0 || p.value.shape[3] % 8 != 0, "head_dim and head_dim_v must be multiples of 8");
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  FA_REFUSE_IF(p.query.shape[1] * row_tiles(p, p.query, 64).of_head > kLimit ||
                   p.key.shape[1] * row_tiles(p, p.key, kTileKeys).of_head > kLimit,
               "more than 2^31 tiles");
  return true;
}

}  // namespace

Memory take_memory(const AttentionParams& params, int head_dim, Variant variant, Workspace* workspace) {
  const int rows = tile_rows(head_dim, variant);
  Memory memory{};
  memory.rows = row_numbers(params, rows, params.bias.present, workspace);
  const int64_t tiles = memory.rows.tiles.of_head * params.query.shape[1];
  const bool several = params.key.shape[2] > kTileKeys;  // key tiles add to a row's gradient
  memory.sums = workspace->take<float>(several ? tiles * rows * head_dim : 0);
  memory.num_counters = blocks_of_item(head_dim) * tiles + 1;
  memory.counters = workspace->take<unsigned>(memory.num_counters);
  return memory;
}

bool plan(const StepParams& p, const Gradients& gradients, BackwardPlan* plan, std::string* why_not) {
  FA_REFUSE_IF(plan->device.compute_capability != 90, "needs compute capability 9.0 (Hopper)");
  FA_REFUSE_IF(plan->device.shared_memory_bytes < kSharedLimit,
               "needs " + std::to_string(kSharedLimit) + " bytes of shared memory in a thread block");
  FA_REFUSE_IF(size_of(p.query.dtype) != 2,
               std::string("takes float16 and bfloat16 only, the tensors are ") + name_of(p.query.dtype));
  if (!suits_scores(p, why_not) || !suits_bias(p, gradients, why_not) || !suits_memory(p, gradients, why_not)) return false;
  FA_REFUSE_IF(
      needs_exact_deltas(p, gradients),
      "computes D from the rounded output, which is not exact enough for d_sinks, a d_bias that all keys share, and rows "
      "of few keys");
  const Instance* instance = find_instance(p);
  FA_REFUSE_IF(instance == nullptr,
               std::string("head_dim or head_dim_v is above ") + (p.bias.present           ? "128, with a bias"
                                                                  : p.cu_seqlens_q.present ? "128, with packed sequences"
                                                                                           : "256"));
  plan->instance = static_cast<int>(instance - kInstances);
  Workspace workspace(nullptr);
  take_memory(p, instance->head_dim, instance->variant, &workspace);
  plan->workspace_bytes = workspace.bytes();
  return true;
}

Status launch(const BackwardPlan& plan, const StepParams& params, const Gradients& gradients, const ExecutionContext& context) {
  return kInstances[plan.instance].launch(plan, params, gradients, context);
}

}  // namespace fa::backward_sm90
