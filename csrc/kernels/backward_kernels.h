// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels' rows of the table of backward kernels, in order of preference. Included by backward.cpp.
#pragma once

#include "backward.h"

#define FA_CUDA_BACKWARD_KERNEL(name) {#name, DeviceType::kCuda, name::plan, name::launch},
#define FA_CUDA_BACKWARD_KERNELS  // none yet
