// SPDX-License-Identifier: Apache-2.0
// Merges the partial results of split keys into out and lse, with the sink and the rows without keys.
#pragma once

#include <vector_types.h>

#include "fa/attention.h"

namespace fa {

/// Each split's normalized output, and maximum and sum of its softmax (SoftmaxState). Not their log-sum-exp: beside a maximum of
/// -3.4e38, which masking by addition gives, it would forget the number of keys.
struct Partials {
  const float* out;     // [num_splits, B, H_q, S_q, D_v]
  const float2* state;  // [num_splits, B, H_q, S_q]
  int num_splits;
};

Status combine(const Partials& partials, const AttentionParams& params, const ExecutionContext& context);

}  // namespace fa
