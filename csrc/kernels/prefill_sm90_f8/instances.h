// SPDX-License-Identifier: Apache-2.0
// Declares what the generated sources define, so that the host compiler needs no kernel code.
#pragma once

#include "fa/attention.h"
#include "kernels/prefill_sm90_f8/shape.h"

namespace fa::prefill_sm90_f8 {

template <int kHeadDim, Variant kVariant>
Status launch_instance(const Plan& plan, const AttentionParams& params, const ExecutionContext& context);

}  // namespace fa::prefill_sm90_f8
