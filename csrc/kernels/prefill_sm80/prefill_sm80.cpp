// SPDX-License-Identifier: Apache-2.0
#include "kernels/prefill_sm80/prefill_sm80.h"

#include <algorithm>

#include "kernels/prefill_sm80/instance.h"
#include "kernels/prefill_sm80/tile_grid.h"

namespace fa::prefill_sm80 {
namespace {

/// The plain variant keeps raw products as scores: it can't add to them, and a maximum of raw products must be one of scores.
/// float32 is bound by its products, and heads above 256 are rare, so they have one variant for all problems.
Variant variant_of(const AttentionParams& p) {
  if (p.query.dtype == DType::kFloat32)
    return p.float32_precision == Float32Precision::kTf32 ? Variant::kTf32 : Variant::kModified;
  const bool is_wide = std::max(p.query.shape[3], p.value.shape[3]) > 256;
  const bool modified =
      is_wide || p.mask.present || p.bias.present || p.alibi_slopes.present || p.softcap != 0.0f || p.softmax_scale <= 0.0f;
  return modified ? Variant::kModified : Variant::kPlain;
}

}  // namespace

bool plan(const AttentionParams& params, Plan* plan, std::string* why_not) {
  return plan_instance(params, variant_of(params), plan, why_not);
}

Status launch(const Plan& plan, const AttentionParams& params, const ExecutionContext& context) {
  return launch_instance(plan, params, TileGrid{}, context);
}

}  // namespace fa::prefill_sm80
