// SPDX-License-Identifier: Apache-2.0
// A bias as the copy engine sees it. Asked by the host, where a kernel would read a bias by tiles.
#pragma once

#include "fa/attention.h"
#include "kernels/common/tensor_map.h"

namespace fa {

/// An axis of batch entries or heads that is broadcast has size 1.
inline TensorView bias_tensor(TensorView bias) {
  for (int axis = 0; axis < 2; ++axis) {
    if (bias.stride[axis] == 0) bias.shape[axis] = 1;
  }
  return bias;
}

/// Can the copy engine bring tiles of the bias? Else threads read it element by element.
inline bool bias_has_tiles(const AttentionParams& p) {
  const TensorView& bias = p.bias;
  return bias.present && bias.dtype == p.query.dtype && bias.shape[2] > 1 && bias.stride[2] != 0 && bias.shape[3] > 1 &&
         bias.stride[3] == 1 && has_tensor_map(bias_tensor(bias));
}

}  // namespace fa
