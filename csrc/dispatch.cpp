// SPDX-License-Identifier: Apache-2.0
// The ordered table of kernels: the first that supports a problem on a device runs it. explain() prints what the table says.
// Called through fa/attention.h by the adapters.
#include "dispatch.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/attention_cpu.h"
#ifdef FA_WITH_CUDA
#include "kernels/empty_rows/empty_rows.h"
#include "kernels/kernels.h"
#endif

namespace fa {
namespace {

// clang-format off
const Kernel kTable[] = {
    {"cpu", DeviceType::kCpu, cpu::plan, cpu::launch},
#ifdef FA_WITH_CUDA
    FA_CUDA_KERNELS
#endif
};
// clang-format on

constexpr const char* kNoCuda = "this build has no CUDA kernels (it was made without nvcc)";

/// Can a row attend no key, though there are keys?
bool may_have_empty_rows(const AttentionParams& p) {
  return p.mask.present || p.bias.present || p.kv_lengths.present || p.cu_seqlens_q.present || p.window_left >= 0 ||
         p.window_right >= 0;
}

size_t align(size_t bytes) { return (bytes + 255) / 256 * 256; }

/// Memory for log-sum-exp where it is needed but not wanted.
size_t lse_bytes(const AttentionParams& p, bool fills_means) {
  if (!fills_means || p.lse.present) return 0;
  return align(static_cast<size_t>(p.query.shape[0] * p.query.shape[1] * p.query.shape[2]) * sizeof(float));
}

bool fills_means(const AttentionParams& p, const Device& device) {
  return device.type == DeviceType::kCuda && p.empty_row == EmptyRow::kMean && may_have_empty_rows(p);
}

/// Does the kernel take the problem? On success the plan is complete; else *why_not, where given, says why not.
bool plan_with(const Kernel& kernel, const AttentionParams& params, const Device& device, Plan* plan, std::string* why_not) {
  FA_REFUSE_IF(kernel.device != device.type,
               kernel.device == DeviceType::kCpu ? "runs on the CPU only" : "runs on CUDA devices only");
  *plan = {};
  plan->device = device;
  if (!kernel.plan(params, plan, why_not)) return false;
  plan->kernel = &kernel;
  plan->fills_means = fills_means(params, device);
  plan->lse_bytes = lse_bytes(params, plan->fills_means);
  if (plan->lse_bytes > 0) plan->workspace_bytes = align(plan->workspace_bytes) + plan->lse_bytes;
  return true;
}

/// Why no kernel, or not the one of this name, takes the problem.
std::string refusals(const AttentionParams& params, const Device& device, const char* name) {
  std::string text;
  bool known = false;
  for (const Kernel& kernel : kTable) {
    if (name != nullptr ? std::strcmp(name, kernel.name) != 0 : kernel.device != device.type) continue;
    known = true;
    Plan unused;
    std::string sentence;
    plan_with(kernel, params, device, &unused, &sentence);
    text += (text.empty() ? "" : "; ") + std::string(kernel.name) + ": " + sentence;
  }
  if (known) return text;
  if (name == nullptr) return kNoCuda;
  text = "there is no kernel '" + std::string(name) + "'; there are";
  for (const Kernel& kernel : kTable) text += std::string(" ") + kernel.name;
  return text;
}

/// The first tensor that has elements but no memory; null: there is none.
const char* missing_memory(const AttentionParams& p) {
  const std::pair<const char*, const TensorView*> tensors[] = {{"query", &p.query},
                                                               {"key", &p.key},
                                                               {"value", &p.value},
                                                               {"out", &p.out},
                                                               {"lse", &p.lse},
                                                               {"mask", &p.mask},
                                                               {"bias", &p.bias},
                                                               {"kv_lengths", &p.kv_lengths},
                                                               {"query_lengths", &p.query_lengths},
                                                               {"query_offsets", &p.query_offsets},
                                                               {"cu_seqlens_q", &p.cu_seqlens_q},
                                                               {"cu_seqlens_kv", &p.cu_seqlens_kv},
                                                               {"alibi_slopes", &p.alibi_slopes},
                                                               {"sinks", &p.sinks}};
  for (const auto& [name, t] : tensors) {
    if (t->present && t->data == nullptr && !t->empty()) return name;
  }
  return nullptr;
}

#ifdef FA_WITH_CUDA
/// EmptyRow::kMean on CUDA: the kernel writes 0 into rows that attend no key, and a second one their mean.
Status launch_with_means(const Plan& plan, AttentionParams params, const ExecutionContext& context) {
  params.empty_row = EmptyRow::kZero;
  if (plan.lse_bytes > 0) {
    const int64_t (&q)[4] = params.query.shape;
    params.lse = {static_cast<char*>(context.workspace) + (plan.workspace_bytes - plan.lse_bytes),
                  DType::kFloat32,
                  true,
                  {q[0], q[1], q[2], 1},
                  {q[1] * q[2], q[2], 1, 1}};
  }
  if (Status status = plan.kernel->launch(plan, params, context); !status.ok()) return status;
  return fill_empty_rows(params, context);
}
#endif

}  // namespace

Status plan(const AttentionParams& params, const Device& device, Plan* plan, const char* kernel) {
  *plan = {};
  if (Status status = validate(params); !status.ok()) return status;
  for (const Kernel& row : kTable) {
    if (kernel != nullptr && std::strcmp(kernel, row.name) != 0) continue;
    if (plan_with(row, params, device, plan, nullptr)) return {};
  }
  *plan = {};
  return {StatusCode::kUnsupported, refusals(params, device, kernel)};
}

Status launch(const Plan& plan, const AttentionParams& params, const ExecutionContext& context) {
  if (plan.kernel == nullptr) return {StatusCode::kInvalidArgument, "there is no plan: plan() was not called or has failed"};
  if (plan.workspace_bytes > context.workspace_bytes || (plan.workspace_bytes > 0 && context.workspace == nullptr)) {
    return {StatusCode::kInvalidArgument, std::string(plan.kernel->name) + " needs a workspace of " +
                                              std::to_string(plan.workspace_bytes) + " bytes, but the context has " +
                                              std::to_string(context.workspace_bytes)};
  }
  if (const char* name = missing_memory(params))
    return {StatusCode::kInvalidArgument, std::string(name) + " has elements but no data"};
  if (params.out.empty()) return {};  // also where a kernel could not describe a tensor without elements
#ifdef FA_WITH_CUDA
  if (plan.fills_means) return launch_with_means(plan, params, context);
#endif
  return plan.kernel->launch(plan, params, context);
}

size_t max_workspace_bytes(const AttentionParams& largest, const Device& device) {
  if (!validate(largest).ok()) return 0;
  size_t bytes = 0;
  for (const Kernel& kernel : kTable) {
    Plan plan;
    if (kernel.device != device.type) continue;
    if (kernel.max_workspace_bytes != nullptr) {
      const size_t own = kernel.max_workspace_bytes(largest, device);
      bytes = std::max(bytes, align(own) + lse_bytes(largest, fills_means(largest, device)));
    } else if (plan_with(kernel, largest, device, &plan, nullptr)) {
      bytes = std::max(bytes, plan.workspace_bytes);
    }
  }
  return bytes;
}

const char* kernel_name(DeviceType type, int idx) {
  for (const Kernel& kernel : kTable) {
    if (kernel.device == type && idx-- == 0) return kernel.name;
  }
  return nullptr;
}

std::string explain(const AttentionParams& params, const Device& device) {
  if (Status status = validate(params); !status.ok()) return "no kernel: " + status.sentence;
  std::string text;
  const Kernel* chosen = nullptr;
  for (const Kernel& kernel : kTable) {
    Plan plan;
    std::string sentence;
    const bool can = plan_with(kernel, params, device, &plan, &sentence);
    if (can) sentence = chosen == nullptr ? "runs this problem" : "could run it, but comes later in the table";
    text += std::string(text.empty() ? "" : "\n") + kernel.name + ": " + sentence;
    if (chosen == nullptr && can) chosen = &kernel;
  }
  if (kernel_name(device.type, 0) == nullptr) text += std::string("\n") + kNoCuda;
  return (chosen == nullptr ? "no kernel" : chosen->name) + std::string(chosen == nullptr ? "\n" : ": chosen\n") + text;
}

#ifndef FA_WITH_CUDA
Status query_cuda_device(int, Device*) { return {StatusCode::kUnsupported, kNoCuda}; }
Status current_cuda_device(int*) { return {StatusCode::kUnsupported, kNoCuda}; }
#endif

}  // namespace fa
