// SPDX-License-Identifier: Apache-2.0
// The compiled instances of decode_sm90: one for each element type of queries and of caches and
// each head_dim bucket that instantiate.cmake lists. Defined in
// launch.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "fa/attention.h"

namespace fa::decode_sm90 {

/// What keys and values are stored as: elements like the queries', or numbers of a quantized cache.
enum class Variant : uint8_t { kAsQuery, kInt8, kFloat8 };

template <typename T, int kHeadDim, Variant kStored>
Status launch_instance(const Plan& plan, const StepParams& params, const ExecutionContext& context);

}  // namespace fa::decode_sm90
