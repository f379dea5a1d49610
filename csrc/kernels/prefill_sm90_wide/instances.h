// SPDX-License-Identifier: Apache-2.0
// Declares what the generated sources define, so that the host compiler needs no kernel code.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "fa/attention.h"

namespace fa::prefill_sm90_wide {

enum class Variant : uint8_t {
  kPlain,     // scale > 0, lengths, window, sinks, mask without rows: scores stay raw products, the scale is in the exponent
  kModified,  // on top of it softcap, bias, mask with rows, ALiBi, or a scale <= 0: scores are natural
};

template <typename T, int kHeadDim, Variant kVariant>
Status launch_instance(const Plan& plan, const AttentionParams& params, const ExecutionContext& context);

}  // namespace fa::prefill_sm90_wide
