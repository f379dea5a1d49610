// SPDX-License-Identifier: Apache-2.0
// The CPU row of the table of backward kernels, and what backward_cpu.cpp asks of backward_kernel.cpp, which is compiled once for
// each instruction set.
#pragma once

#include "backward.h"
#include "semantics/sequence.h"

namespace fa::cpu {

bool plan_backward(const StepParams& params, const Gradients& gradients, BackwardPlan* plan, std::string* why_not);
Status launch_backward(const BackwardPlan& plan, const StepParams& params, const Gradients& gradients,
                       const ExecutionContext& context);

/// What all tasks of a backward call share.
struct BackwardCall {
  const StepParams& params;
  const Gradients& gradients;
  SequenceRule sequences;
  int64_t longest_keys;  // keys in use in the longest sequence
  float* sink_sums;      // [sequences, H_q]; null: not wanted
};

/// The gradients of one key head of one sequence, and of the queries that read it.
struct HeadTask {
  int64_t sequence_idx, kv_head;
};

/// The elements of d_bias of one entry and head, of rows first_row … on those that are not broadcast.
struct BiasTask {
  int64_t batch_idx, head, first_row;
};

/// One compilation of backward_kernel.cpp.
struct BackwardIsa {
  size_t (*scratch_bytes)(const BackwardCall& call);
  void (*head_gradients)(const BackwardCall& call, const HeadTask& task, void* scratch);  // scratch: 64-byte aligned
  void (*bias_gradient)(const BackwardCall& call, const BiasTask& task, void* scratch);
};

inline constexpr int64_t kBackwardRows = 96;  // query rows of a tile

}  // namespace fa::cpu
