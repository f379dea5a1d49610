// SPDX-License-Identifier: Apache-2.0
// In which problems the products of tensor cores can make NaN of rows that are numbers. Asked by the host where it fills the
// arguments of kernels; what these do about it stands in hidden_values.cuh.
#pragma once

#include "fa/attention.h"
#include "semantics/sequence.h"

namespace fa {

/// A hidden value that is infinite or NaN does it, and where a float32 number is split in two parts, any infinite one, whose
/// second part is NaN.
inline bool may_spoil_rows(const AttentionParams& p) {
  return hides_keys(p) || (p.query.dtype == DType::kFloat32 && p.float32_precision == Float32Precision::kTf32x3);
}

}  // namespace fa
