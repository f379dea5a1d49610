// SPDX-License-Identifier: Apache-2.0
// The compiled instances of decode_sm90: one for each element type and head_dim bucket that instantiate.cmake lists. Defined in
// launch.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "fa/attention.h"

namespace fa::decode_sm90 {

enum class Variant : uint8_t { kAny };

template <typename T, int kHeadDim, Variant kVariant>
Status launch_instance(const Plan& plan, const StepParams& params, const ExecutionContext& context);

}  // namespace fa::decode_sm90
