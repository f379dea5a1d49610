// SPDX-License-Identifier: Apache-2.0
// The CUDA half of append_kv: kernels/append_kv implements it, append_kv.cpp has checked the tensors.
#pragma once

#include "fa/attention.h"

namespace fa {

Status append_kv_cuda(const TensorView& past, const TensorView& fresh, const TensorView& present, const Device& device,
                      const ExecutionContext& context);

}  // namespace fa
