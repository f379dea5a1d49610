// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels' rows of the table of backward kernels, in order of preference. Included by backward.cpp.
#pragma once

#include "backward.h"
#include "kernels/backward_sm80/backward_sm80.h"
#include "kernels/backward_sm90/backward_sm90.h"

#define FA_CUDA_BACKWARD_KERNEL(name) {#name, DeviceType::kCuda, name::plan, name::launch},
#ifdef FA_WITH_SM90
#define FA_HOPPER_BACKWARD_KERNELS FA_CUDA_BACKWARD_KERNEL(backward_sm90)
#else
#define FA_HOPPER_BACKWARD_KERNELS
#endif
#define FA_CUDA_BACKWARD_KERNELS FA_HOPPER_BACKWARD_KERNELS FA_CUDA_BACKWARD_KERNEL(backward_sm80)
