// SPDX-License-Identifier: Apache-2.0
// Which problems the Hopper kernel for float32 takes, and the choice of its instance.
#include "kernels/prefill_sm90_f32/prefill_sm90_f32.h"

#include <algorithm>

#include "dispatch.h"
#include "kernels/common/smallest_instance.h"
#include "kernels/prefill_sm90/prefill_sm90.h"
#include "kernels/prefill_sm90_f32/instances.h"

namespace fa::prefill_sm90_f32 {
namespace {

struct Instance {
  int head_dim;  // bucket: the largest head_dim and head_dim_v it takes
  Float32Precision precision;
  Status (*launch)(const Plan& plan, const AttentionParams& params, const ExecutionContext& context);
};

const Instance kInstances[] = {
#define FA_INSTANCE(T, dtype, head_dim, precision) \
  {head_dim, Float32Precision::precision, launch_instance<head_dim, Float32Precision::precision>},
#include "kernels/prefill_sm90_f32/instances.def"
#undef FA_INSTANCE
};

const Instance* find_instance(const AttentionParams& p) {
  return smallest_instance(kInstances, p, [&](const Instance& instance) { return instance.precision == p.float32_precision; });
}

}  // namespace

bool plan(const AttentionParams& p, Plan* plan, std::string* why_not) {
  FA_REFUSE_IF(p.query.dtype != DType::kFloat32, std::string("takes float32 only, the tensors are ") + name_of(p.query.dtype));
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

}  // namespace fa::prefill_sm90_f32
