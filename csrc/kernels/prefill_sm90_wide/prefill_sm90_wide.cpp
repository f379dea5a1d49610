// SPDX-License-Identifier: Apache-2.0
// Which problems the kernel for wide heads takes, and the choice of its instance.
#include "kernels/prefill_sm90_wide/prefill_sm90_wide.h"

#include <algorithm>
#include <limits>

#include "dispatch.h"
#include "kernels/prefill_sm90/prefill_sm90.h"
#include "kernels/prefill_sm90_wide/instances.h"
#include "kernels/prefill_sm90_wide/shape.h"

namespace fa::prefill_sm90_wide {
namespace {

struct Instance {
  DType dtype;
  int head_dim;  // the largest head_dim and head_dim_v it takes
  Variant variant;
  Status (*launch)(const Plan& plan, const AttentionParams& params, const ExecutionContext& context);
};

const Instance kInstances[] = {
#define FA_INSTANCE(T, dtype, head_dim, variant) \
  {dtype, head_dim, Variant::variant, launch_instance<T, head_dim, Variant::variant>},
#include "kernels/prefill_sm90_wide/instances.def"
#undef FA_INSTANCE
};

constexpr int64_t kLeastHeadDim = 257;  // what prefill_sm90 takes is faster there

}  // namespace

bool plan(const AttentionParams& p, Plan* plan, std::string* why_not) {
  FA_REFUSE_IF(size_of(p.query.dtype) != 2,
               std::string("takes float16 and bfloat16 only, the tensors are ") + name_of(p.query.dtype));
  FA_REFUSE_IF(p.query_bias.present, "adds no query_bias");
  if (!prefill_sm90::suits_hopper(p, plan->device, why_not)) return false;
  const int64_t head_dim = std::max(p.query.shape[3], p.value.shape[3]);
  FA_REFUSE_IF(head_dim < kLeastHeadDim, "is for head_dim above 256, the heads have " + std::to_string(head_dim));
  FA_REFUSE_IF(head_dim > kMaxHeadDim, "head_dim " + std::to_string(head_dim) + " is above " + std::to_string(kMaxHeadDim));
  const Splits splits = choose_splits(p, plan->device);
  FA_REFUSE_IF(prefill_sm90::num_tiles(p, kPairRows) > std::numeric_limits<int32_t>::max() / (2 * splits.count),
               "more than 2^31 blocks of rows");
  const Variant variant = prefill_sm90::is_modified(p) ? Variant::kModified : Variant::kPlain;
  const Instance* found = std::find_if(std::begin(kInstances), std::end(kInstances), [&](const Instance& instance) {
    return instance.dtype == p.query.dtype && instance.variant == variant;
  });
  plan->instance = plan_instance(static_cast<int>(found - kInstances), splits);
  plan->num_splits = splits.count;
  plan->workspace_bytes = workspace_bytes(p, splits);
  return true;
}

/// Smaller problems may be split over the grid where the largest is not. All parts of rows then run at once.
size_t max_workspace_bytes(const AttentionParams& largest, const Device& device) {
  const int64_t head_dim = std::max(largest.query.shape[3], largest.value.shape[3]);
  const bool can_run = device.compute_capability == 90 && size_of(largest.query.dtype) == 2 && head_dim >= kLeastHeadDim &&
                       head_dim <= kMaxHeadDim;
  if (!can_run || largest.cu_seqlens_q.present) return 0;
  const int64_t partial_rows = std::min<int64_t>(num_rows(largest) * kMaxOverGrid, device.num_sms / 2 * kPairRows);
  return static_cast<size_t>(partial_rows * (largest.value.shape[3] + 2)) * sizeof(float);
}

Status launch(const Plan& plan, const AttentionParams& params, const ExecutionContext& context) {
  return kInstances[instance_of(plan)].launch(plan, params, context);
}

}  // namespace fa::prefill_sm90_wide
