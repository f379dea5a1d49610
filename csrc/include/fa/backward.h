// SPDX-License-Identifier: Apache-2.0
// The backward pass of the operator: plan_backward() checks a problem and its gradients once, launch_backward() computes them.
// Scores are computed anew from queries, keys and the forward pass's log-sum-exp, so memory stays linear in the sequence. Called
// by the adapters in plugin/, under the same promises as fa/attention.h.
#pragma once

#include <cstddef>
#include <string>

#include "fa/attention.h"

namespace fa {

/// What comes into the backward pass and what it computes. Beside it params.out and params.lse are there, as the forward pass has
/// written them, and are read. What is written is overwritten, not added to; its sums are formed in float32, in an order that
/// depends on shapes and lengths alone: results are bitwise repeatable, on any number of threads.
struct Gradients {
  TensorView d_out;    // [B, H_q, S_q, D_v], dtype of query, read; broadcast by stride 0 on any axis but the last
  TensorView d_lse;    // [B, H_q, S_q] float32, read; absent: 0
  TensorView d_query;  // [B, H_q, S_q, D], dtype of query, the last axis contiguous, as in the next two
  TensorView d_key;    // [B, H_kv, S_kv, D]
  TensorView d_value;  // [B, H_kv, S_kv, D_v]
  // Shape of bias, float32; sums over its axes of stride 0, also of length 0, so an empty one has no such axis. Absent: not
  // wanted.
  TensorView d_bias;
  TensorView d_sinks;  // [H_q] float32; absent: not wanted
};

/// A row of the table of backward kernels (backward.cpp).
struct BackwardKernel;

/// How the gradients of one problem are computed on one device: made by plan_backward().
struct BackwardPlan {
  const BackwardKernel* kernel = nullptr;  // null: plan_backward() has not succeeded
  Device device;
  int instance = 0;            // which of the kernel's own instances
  size_t workspace_bytes = 0;  // memory that launch_backward() needs beside the tensors; depends on no data
};

/// Checks shapes, dtypes and strides of a problem and its gradients. kUnsupported for what has no backward pass: caches, rotary
/// embedding and norms of a step, EmptyRow::kMean.
Status validate_backward(const StepParams& params, const Gradients& gradients);

/// Checks the problem and chooses the first backward kernel that supports it, or the one called `kernel` if that is not null.
/// Looks at no data, as plan() does.
Status plan_backward(const StepParams& params, const Gradients& gradients, const Device& device, BackwardPlan* plan,
                     const char* kernel = nullptr);

/// Computes the gradients as planned, of the tensors of plan_backward() or others of the same shapes, strides and alignment. Rows
/// beyond a length, and those of no packed sequence, get gradients of 0. On CUDA it only enqueues.
Status launch_backward(const BackwardPlan& plan, const StepParams& params, const Gradients& gradients,
                       const ExecutionContext& context);

/// The backward kernels for a type of device, in order of preference: names for plan_backward(). Null beyond the last.
const char* backward_kernel_name(DeviceType type, int idx);

}  // namespace fa
