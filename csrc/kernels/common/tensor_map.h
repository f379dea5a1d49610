// SPDX-License-Identifier: Apache-2.0
// Host side of the copy engine: descriptions of strided tensors (CUtensorMap). The driver's encoder is found at run time, so that
// nothing links against libcuda and the library loads where there is no GPU.
#pragma once

#include <cuda.h>

#include <string>

#include "fa/attention.h"

namespace fa {

/// Can the copy engine address this [B, H, S, D] tensor of float32, float16 or bfloat16?
bool has_tensor_map(const TensorView& tensor);

/// Why it can't: a sentence's end ("has …").
std::string tensor_map_obstacle(const TensorView& tensor);

/// Boxes of box_rows rows x 128 bytes of columns, 128-byte swizzle, zeros outside. The tensor has no obstacle.
Status encode_tensor_map(const TensorView& tensor, int box_rows, CUtensorMap* map);

}  // namespace fa
