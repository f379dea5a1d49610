// SPDX-License-Identifier: Apache-2.0
// Host side of the copy engine: descriptions of strided tensors (CUtensorMap), which the driver encodes.
#pragma once

#include <cuda.h>

#include <string>

#include "fa/attention.h"

namespace fa {

/// Can the copy engine address this [B, H, S, D] tensor of float32, float16, bfloat16, float8 or int8?
bool has_tensor_map(const TensorView& tensor);

/// Why it can't: a sentence's end ("has …").
std::string tensor_map_obstacle(const TensorView& tensor);

/// What the L2 cache fetches from device memory for a copy.
enum class L2Fetch {
  kTwoLines,  // 256 bytes: the next ones too, which will be wanted soon
  kLine,      // 128 bytes: for what is read once, 2 to 4 % faster where the memory is the limit
};

/// Boxes of box_rows rows x 128 bytes of columns, 128-byte swizzle, zeros outside. The tensor has no obstacle.
Status encode_tensor_map(const TensorView& tensor, int box_rows, CUtensorMap* map, L2Fetch fetch = L2Fetch::kTwoLines);

/// Boxes of box_rows rows x `panels` times 128 bytes, one such panel behind the other, 128-byte swizzle, zeros outside; what the
/// L2 cache fetches is L2Fetch::kLine. The tensor has no obstacle, and its rows are whole panels.
Status encode_panels_map(const TensorView& tensor, int box_rows, int panels, CUtensorMap* map);

}  // namespace fa
