// SPDX-License-Identifier: Apache-2.0
// Merges the partial results of split keys into out and lse, with the sink and the rows without keys.
#pragma once

#include "fa/attention.h"

namespace fa {

/// Each split's normalized output and natural log-sum-exp (-inf: it saw no key of that row).
struct Partials {
  const float* out;  // [num_splits, B, H_q, S_q, D_v]
  const float* lse;  // [num_splits, B, H_q, S_q]
  int num_splits;
};

Status combine(const Partials& partials, const AttentionParams& params, const ExecutionContext& context);

}  // namespace fa
