// SPDX-License-Identifier: Apache-2.0
// EmptyRow::kMean and kValue on CUDA, for all kernels alike: after an attention kernel has written 0 into the rows that attend no
// key, they get the mean of all values, or the value that is given for their head. Called by dispatch.cpp.
#pragma once

#include "fa/attention.h"

namespace fa {

/// Rows whose log-sum-exp is -inf become params.empty_row_value of their head or, where that is absent, the mean of the values of
/// their key head, which is computed once, and only where there is such a row. params.lse is present and written.
/// `of_keys_in_use`: the mean is that of the keys below a length, not of all.
Status fill_empty_rows(const AttentionParams& params, bool of_keys_in_use, const ExecutionContext& context);

}  // namespace fa
