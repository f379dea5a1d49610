// SPDX-License-Identifier: Apache-2.0
// The backward pass on Hopper. A row of the table of backward kernels (kernels/backward_kernels.h).
#pragma once

#include <cstdint>
#include <string>

#include "fa/backward.h"
#include "kernels/backward_rows/backward_rows.h"

namespace fa::backward_sm90 {

enum class Variant : uint8_t;

/// The workspace: numbers of the rows, sums of d_query, and counters.
struct Memory {
  RowNumbers rows;
  float* sums;
  unsigned* counters;  // one of each query tile, and one more
  int64_t num_counters;
};

/// For an instance of this bucket and variant. With null memory it only counts.
Memory take_memory(const AttentionParams& params, int head_dim, Variant variant, Workspace* workspace);

bool plan(const StepParams& params, const Gradients& gradients, BackwardPlan* plan, std::string* why_not);
Status launch(const BackwardPlan& plan, const StepParams& params, const Gradients& gradients, const ExecutionContext& context);

}  // namespace fa::backward_sm90
