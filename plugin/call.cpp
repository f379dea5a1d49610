// SPDX-License-Identifier: Apache-2.0
// A bound call: the memory of its outputs and its workspace, its plan and its launch (bind.h).
#include "bind.h"

namespace fa::plugin {
namespace {

constexpr size_t kAlignment = 256;
size_t align(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

size_t bytes_of(const TensorView& view) {
  return align(static_cast<size_t>(view.shape[0] * view.shape[1] * view.shape[2] * view.shape[3]) * size_of(view.dtype));
}

size_t stored_bytes(const Problem& problem) {
  return (problem.in_workspace[0] ? bytes_of(problem.params.key) : 0) +
         (problem.in_workspace[1] ? bytes_of(problem.params.value) : 0);
}

/// Where present_key (0) or present_value (1) is.
void set_present(Problem* problem, int which, void* data) {
  CacheParams& cache = problem->params.cache;
  TensorView& kept = which == 0 ? cache.present_key : cache.present_value;  // of a step that has other memory for itself
  if (problem->present[which].present) {
    problem->present[which].data = data;
  } else if (kept.present) {
    kept.data = data;
  } else {
    (which == 0 ? problem->params.key : problem->params.value).data = data;
  }
}

/// A copy of the input as an output.
Status copy(const TensorView& fresh, const TensorView& present, const Device& device, const ExecutionContext& context) {
  TensorView none = fresh;
  none.shape[2] = 0;
  return append_kv(none, fresh, present, device, context);
}

}  // namespace

void set_output(Problem* problem, Output output, void* data) {
  problem->outputs[static_cast<int>(output)].data = data;
  if (output == Output::kOutput) problem->params.out.data = data;
  if (output == Output::kLse) problem->params.lse.data = data;
  if (output == Output::kPresentKey) set_present(problem, 0, data);
  if (output == Output::kPresentValue) set_present(problem, 1, data);
}

Status plan(const Problem& problem, const Device& device, Plan* plan, const char* kernel) {
  *plan = {};
  if (Status s = fa::plan(problem.params, device, &plan->attention, kernel); !s.ok()) return s;
  plan->stored_bytes = stored_bytes(problem);
  plan->workspace_bytes = plan->stored_bytes + plan->attention.workspace_bytes;
  return {};
}

size_t max_workspace_bytes(const Problem& largest, const Device& device) {
  return stored_bytes(largest) + fa::max_workspace_bytes(largest.params, device);
}

Status launch(const Plan& plan, Problem* problem, const ExecutionContext& context) {
  if (context.workspace_bytes < plan.workspace_bytes || (plan.workspace_bytes > 0 && context.workspace == nullptr))
    return invalid("the workspace has " + std::to_string(context.workspace_bytes) + " bytes; expected " +
                   std::to_string(plan.workspace_bytes));
  const TensorView(&copies)[2] = problem->present;  // outputs that fa::launch() knows nothing of
  if (copies[0].present || copies[1].present)
    if (Status s = check_memory(problem->params, {{"present_key", copies[0]}, {"present_value", copies[1]}}); !s.ok()) return s;
  char* memory = static_cast<char*>(context.workspace);
  for (int which = 0; which < 2; ++which) {
    if (problem->present[which].present)
      if (Status s = copy(problem->fresh[which], problem->present[which], plan.attention.device, context); !s.ok()) return s;
    if (!problem->in_workspace[which]) continue;
    TensorView& stored = which == 0 ? problem->params.key : problem->params.value;
    stored.data = memory;
    memory += bytes_of(stored);
  }
  ExecutionContext inner = context;
  inner.workspace = memory;
  inner.workspace_bytes -= plan.stored_bytes;
  return fa::launch(plan.attention, problem->params, inner);
}

}  // namespace fa::plugin
