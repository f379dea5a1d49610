// SPDX-License-Identifier: Apache-2.0
// Cuts the backward pass into tasks and spreads them over the host's threads. A task is a key head of a sequence, with all query
// heads that read it, so that no two tasks write to the same place; the gradient of a bias, which may be shared by all of them,
// has tasks of its own; those of sinks are summed up at the end. Called through the table in backward.cpp; computes with
// backward_kernel.cpp.
#include "cpu/backward_cpu.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "cpu/tile.h"
#include "cpu/workers.h"

namespace fa::cpu {
namespace {

/// 0 into a gradient whose last axis is contiguous.
void clear(const TensorView& t) {
  const int64_t size = size_of(t.dtype);
  for (int64_t b = 0; b < t.shape[0]; ++b) {
    for (int64_t h = 0; h < t.shape[1]; ++h) {
      for (int64_t i = 0; i < t.shape[2] && t.shape[3] > 0; ++i) {
        const int64_t offset = b * t.stride[0] + h * t.stride[1] + i * t.stride[2];
        std::memset(static_cast<char*>(t.data) + offset * size, 0, t.shape[3] * size);
      }
    }
  }
}

/// Elements of an axis that are not one another. An axis that a bias has only by broadcasting has one, whatever its length is.
int64_t distinct(const TensorView& t, int axis) { return t.stride[axis] == 0 && t.shape[axis] != 1 ? 1 : t.shape[axis]; }

/// The gradient of a bias that no score of an empty problem reads.
void clear_bias(const TensorView& t) {
  for (int64_t b = 0; b < distinct(t, 0); ++b)
    for (int64_t h = 0; h < distinct(t, 1); ++h)
      for (int64_t i = 0; i < distinct(t, 2); ++i)
        for (int64_t j = 0; j < distinct(t, 3); ++j)
          static_cast<float*>(t.data)[b * t.stride[0] + h * t.stride[1] + i * t.stride[2] + j * t.stride[3]] = 0;
}

std::vector<HeadTask> head_tasks(const BackwardCall& call) {
  const StepParams& p = call.params;
  std::vector<std::pair<int64_t, HeadTask>> found;  // longest first
  for (int64_t i = 0; i < num_sequences(p); ++i) {
    const Sequence s = call.sequences.at(i);
    for (int64_t h = 0; h < p.key.shape[1]; ++h) found.push_back({-s.query_length * s.mask.kv_length, {i, h}});
  }
  std::stable_sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<HeadTask> tasks;
  for (const auto& entry : found) tasks.push_back(entry.second);
  return tasks;
}

std::vector<BiasTask> bias_tasks(const BackwardCall& call) {
  const TensorView& d = call.gradients.d_bias;
  std::vector<BiasTask> tasks;
  if (!d.present || d.empty()) return tasks;
  for (int64_t b = 0; b < distinct(d, 0); ++b) {
    for (int64_t h = 0; h < distinct(d, 1); ++h) {
      for (int64_t i = 0; i < distinct(d, 2); i += kBackwardRows) tasks.push_back({b, h, i});
    }
  }
  return tasks;
}

void sum_sinks(const BackwardCall& call) {
  const TensorView& d = call.gradients.d_sinks;
  for (int64_t h = 0; h < d.shape[0]; ++h) {
    double sum = 0;
    for (int64_t i = 0; i < num_sequences(call.params); ++i) sum += call.sink_sums[i * d.shape[0] + h];
    static_cast<float*>(d.data)[d.shape[0] > 1 ? h * d.stride[0] : 0] = static_cast<float>(sum);
  }
}

Status run_tasks_of(const BackwardCall& call, const ExecutionContext& context) {
  const BackwardIsa& isa = *best_isa().backward;
  const size_t bytes = isa.scratch_bytes(call);
  const std::vector<HeadTask> heads = head_tasks(call);
  const auto run_head = [&](size_t i, void* scratch) { isa.head_gradients(call, heads[i], scratch); };
  if (Status status = run_tasks(heads.size(), bytes, context, run_head); !status.ok()) return status;
  const std::vector<BiasTask> biases = bias_tasks(call);
  const auto run_bias = [&](size_t i, void* scratch) { isa.bias_gradient(call, biases[i], scratch); };
  return run_tasks(biases.size(), bytes, context, run_bias);
}

}  // namespace

bool plan_backward(const StepParams&, const Gradients&, BackwardPlan*, std::string*) { return true; }

Status launch_backward(const BackwardPlan&, const StepParams& params, const Gradients& gradients,
                       const ExecutionContext& context) {
  try {
    for (const TensorView* t : {&gradients.d_query, &gradients.d_key, &gradients.d_value}) clear(*t);
    if (gradients.d_bias.present && gradients.d_bias.empty()) clear_bias(gradients.d_bias);
    std::vector<float> sinks(gradients.d_sinks.present ? num_sequences(params) * params.query.shape[1] : 0);
    BackwardCall call{params, gradients, sequence_rule(params), 0, gradients.d_sinks.present ? sinks.data() : nullptr};
    for (int64_t i = 0; i < num_sequences(params); ++i)
      call.longest_keys = std::max(call.longest_keys, call.sequences.at(i).mask.kv_length);
    if (Status status = run_tasks_of(call, context); !status.ok()) return status;
    if (gradients.d_sinks.present) sum_sinks(call);
    return {};
  } catch (const std::bad_alloc&) {
    return {StatusCode::kUnsupported, "out of memory: the CPU kernel could not list its tasks"};
  }
}

}  // namespace fa::cpu
