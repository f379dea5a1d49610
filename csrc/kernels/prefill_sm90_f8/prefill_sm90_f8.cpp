// SPDX-License-Identifier: Apache-2.0
// Which problems the Hopper kernel for float8 takes, and the choice of its instance.
#include "kernels/prefill_sm90_f8/prefill_sm90_f8.h"

#include <algorithm>

#include "dispatch.h"
#include "kernels/common/smallest_instance.h"
#include "kernels/prefill_sm90/prefill_sm90.h"
#include "kernels/prefill_sm90_f8/instances.h"

namespace fa::prefill_sm90_f8 {
namespace {

struct Instance {
  int head_dim;  // bucket: the largest head_dim and head_dim_v it takes
  Variant variant;
  Status (*launch)(const Plan& plan, const AttentionParams& params, const ExecutionContext& context);
};

const Instance kInstances[] = {
#define FA_INSTANCE(T, dtype, head_dim, variant) {head_dim, Variant::variant, launch_instance<head_dim, Variant::variant>},
#include "kernels/prefill_sm90_f8/instances.def"
#undef FA_INSTANCE
};

/// Null where the heads are too wide for any.
const Instance* find_instance(const AttentionParams& p) {
  const bool modified = p.mask.present || p.bias.present || p.alibi_slopes.present || p.softcap != 0.0f || p.lse.present;
  const Variant variant = modified ? Variant::kModified : Variant::kPlain;
  return smallest_instance(kInstances, p, [&](const Instance& instance) { return instance.variant == variant; });
}

}  // namespace

bool plan(const AttentionParams& p, Plan* plan, std::string* why_not) {
  FA_REFUSE_IF(p.query.dtype != DType::kFloat8E4M3,
               std::string("takes float8_e4m3fn only, the tensors are ") + name_of(p.query.dtype));
  if (!prefill_sm90::suits_hopper(p, plan->device, why_not)) return false;
  const Instance* instance = find_instance(p);
  FA_REFUSE_IF(instance == nullptr, "head_dim " + std::to_string(std::max(p.query.shape[3], p.value.shape[3])) + " is above 256");
  plan->instance = static_cast<int>(instance - kInstances);
  plan->workspace_bytes = prefill_sm90::workspace_bytes(p);
  return true;
}

Status launch(const Plan& plan, const AttentionParams& params, const ExecutionContext& context) {
  return kInstances[plan.instance].launch(plan, params, context);
}

}  // namespace fa::prefill_sm90_f8
