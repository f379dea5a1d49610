// SPDX-License-Identifier: Apache-2.0
// EmptyRow::kMean on CUDA, for all kernels alike: after an attention kernel has written 0 into the rows that attend no key, they
// get the mean of all values. Called by dispatch.cpp.
#pragma once

#include "fa/attention.h"

namespace fa {

/// Rows whose log-sum-exp is -inf become the mean of the values of their key head, which is computed once, and only where there
/// is such a row. params.lse is present and written.
Status fill_empty_rows(const AttentionParams& params, const ExecutionContext& context);

}  // namespace fa
