// SPDX-License-Identifier: Apache-2.0
// The ordered table of kernels: the first that supports a problem on a device runs it. explain() prints what the table says.
// Called through fa/attention.h by the adapters.
#include "dispatch.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "cpu/attention_cpu.h"
#include "rules.h"
#ifdef FA_WITH_CUDA
#include "kernels/cache_step/cache_step.h"
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

/// Can a row attend no key and then yield something else than 0? Where there are no keys at all, the mean of the values is 0,
/// too.
bool may_have_empty_rows(const StepParams& p) {
  return (p.empty_row == EmptyRow::kValue && p.key.shape[2] == 0) || p.mask.present || p.bias.present || p.kv_lengths.present ||
         p.cu_seqlens_q.present || p.window_left >= 0 || p.window_right >= 0;
}

size_t align(size_t bytes) { return (bytes + 255) / 256 * 256; }

/// Memory for log-sum-exp where it is needed but not wanted.
size_t lse_bytes(const StepParams& p, bool fills_empty_rows) {
  if (!fills_empty_rows || p.lse.present) return 0;
  return align(static_cast<size_t>(p.query.shape[0] * p.query.shape[1] * p.query.shape[2]) * sizeof(float));
}

bool fills_empty_rows(const StepParams& p, const Device& device) {
  return device.type == DeviceType::kCuda && p.empty_row != EmptyRow::kZero && may_have_empty_rows(p);
}

/// The problem that a kernel of the table is given. On the CPU it is the whole step; on CUDA what a cache step leaves, whose
/// memory lies in `workspace`.
class AttentionStep {
 public:
#ifdef FA_WITH_CUDA
  AttentionStep(const StepParams& params, const Device& device, void* workspace, bool reads_cache) : params_(params) {
    if (device.type == DeviceType::kCuda && cache_step::is_needed(params))
      step_ = cache_step::prepare(params, workspace, reads_cache);
  }
  const StepParams& problem() const { return step_ ? step_->problem : params_; }
  size_t bytes() const { return step_ ? step_->bytes : 0; }
  Status store(const Device& device, const ExecutionContext& context) const {
    return step_ ? cache_step::launch(params_, *step_, device, context) : Status{};
  }

 private:
  std::optional<cache_step::Step> step_;
#else
  AttentionStep(const StepParams& params, const Device&, void*, bool) : params_(params) {}
  const StepParams& problem() const { return params_; }
  size_t bytes() const { return 0; }

 private:
#endif
  const StepParams& params_;
};

/// A problem on a device as kernels are given it: with the cache as it is, or without. Each form is made where it is wanted
/// first.
class Forms {
 public:
  Forms(const StepParams& params, const Device& device) : params_(params), device_(device) {}
  const StepParams& params() const { return params_; }
  const Device& device() const { return device_; }
  const AttentionStep& form(bool reads_cache) {
    std::optional<AttentionStep>& step = steps_[reads_cache];
    if (!step) step.emplace(params_, device_, nullptr, reads_cache);
    return *step;
  }

 private:
  const StepParams& params_;
  const Device& device_;
  std::optional<AttentionStep> steps_[2];
};

/// plan_with, for a kernel that is given the cache as it is, or one that is not.
bool plan_in_form(const Kernel& kernel, Forms* forms, bool reads_cache, Plan* plan, std::string* why_not) {
  const AttentionStep& step = forms->form(reads_cache);
  const Device& device = forms->device();
  *plan = {};
  plan->device = device;
  plan->reads_cache = reads_cache;
  const StepParams& problem = step.problem();
  const bool has_columns = problem.query.shape[1] > 0 && problem.query.shape[3] > 0 && problem.out.shape[3] > 0;
  if (has_columns && !kernel.plan(problem, plan, why_not)) return false;  // else launch() doesn't call the kernel
  plan->kernel = &kernel;
  plan->fills_empty_rows = !plan->writes_empty_rows && fills_empty_rows(problem, device);
  plan->lse_bytes = lse_bytes(problem, plan->fills_empty_rows);
  plan->step_bytes = step.bytes();
  if (plan->lse_bytes > 0) plan->workspace_bytes = align(plan->workspace_bytes) + plan->lse_bytes;
  if (plan->step_bytes > 0) plan->workspace_bytes = align(plan->workspace_bytes) + plan->step_bytes;
  return true;
}

/// Does the kernel take the problem? On success the plan is complete; else *why_not, where given, says why not.
bool plan_with(const Kernel& kernel, Forms* forms, Plan* plan, std::string* why_not) {
  FA_REFUSE_IF(kernel.device != forms->device().type,
               kernel.device == DeviceType::kCpu ? "runs on the CPU only" : "runs on CUDA devices only");
  const CacheParams& c = forms->params().cache;
  const bool is_quantized = c.key_scale.present || c.value_scale.present;
  const bool stays_in_place = c.mode == CacheMode::kPaged || c.mode == CacheMode::kWrite || is_quantized;
  if (kernel.reads_caches && c.new_key.present && stays_in_place && plan_in_form(kernel, forms, true, plan, nullptr)) return true;
  return plan_in_form(kernel, forms, false, plan, why_not);
}

/// Why no kernel, or not the one of this name, takes the problem.
std::string refusals(const StepParams& params, const Device& device, const char* name) {
  std::string text;
  bool known = false;
  Forms forms(params, device);
  for (const Kernel& kernel : kTable) {
    if (name != nullptr ? std::strcmp(name, kernel.name) != 0 : kernel.device != device.type) continue;
    known = true;
    Plan unused;
    std::string sentence;
    plan_with(kernel, &forms, &unused, &sentence);
    text += (text.empty() ? "" : "; ") + std::string(kernel.name) + ": " + sentence;
  }
  if (known) return text;
  if (name == nullptr) return kNoCuda;
  text = "there is no kernel '" + std::string(name) + "'; there are";
  for (const Kernel& kernel : kTable) text += std::string(" ") + kernel.name;
  return text;
}

Status launch_on_cpu(const Plan& plan, const StepParams& params, const ExecutionContext& context) {
  if (params.cache.new_key.present)
    if (Status status = cpu::store(params, context); !status.ok()) return status;
  return params.out.empty() ? Status{} : plan.kernel->launch(plan, params, context);
}

#ifdef FA_WITH_CUDA
/// Not EmptyRow::kZero on CUDA: the kernel writes 0 into rows that attend no key, and a second one their mean or value.
Status launch_and_fill(const Plan& plan, StepParams params, bool of_keys_in_use, void* lse, const ExecutionContext& context) {
  params.empty_row = EmptyRow::kZero;
  if (plan.lse_bytes > 0) {
    const int64_t (&q)[4] = params.query.shape;
    params.lse = {lse, DType::kFloat32, true, {q[0], q[1], q[2], 1}, {q[1] * q[2], q[2], 1, 1}};
  }
  if (Status status = plan.kernel->launch(plan, params, context); !status.ok()) return status;
  return fill_empty_rows(params, of_keys_in_use, context);
}

Status launch_on_cuda(const Plan& plan, const StepParams& params, const ExecutionContext& context) {
  char* const step_memory = static_cast<char*>(context.workspace) + (plan.workspace_bytes - plan.step_bytes);
  const AttentionStep step(params, plan.device, plan.step_bytes > 0 ? step_memory : nullptr, plan.reads_cache);
  if (Status status = step.store(plan.device, context); !status.ok()) return status;
  if (params.out.empty()) return {};  // also where a kernel could not describe a tensor without elements
  if (!plan.fills_empty_rows) return plan.kernel->launch(plan, step.problem(), context);
  const bool of_keys_in_use = params.cache.mode != CacheMode::kAppend;
  return launch_and_fill(plan, step.problem(), of_keys_in_use, step_memory - plan.lse_bytes, context);
}
#endif

}  // namespace

Status plan(const StepParams& params, const Device& device, Plan* plan, const char* kernel) {
  *plan = {};
  if (Status status = validate(params); !status.ok()) return status;
  Forms forms(params, device);
  for (const Kernel& row : kTable) {
    if (kernel != nullptr && std::strcmp(kernel, row.name) != 0) continue;
    if (plan_with(row, &forms, plan, nullptr)) return {};
  }
  *plan = {};
  return {StatusCode::kUnsupported, refusals(params, device, kernel)};
}

Status launch(const Plan& plan, const StepParams& params, const ExecutionContext& context) {
  if (plan.kernel == nullptr) return {StatusCode::kInvalidArgument, "there is no plan: plan() was not called or has failed"};
  FA_CHECK(check_workspace(plan.kernel->name, plan.workspace_bytes, context));
  FA_CHECK(check_memory(params));
#ifdef FA_WITH_CUDA
  if (plan.device.type == DeviceType::kCuda) return launch_on_cuda(plan, params, context);
#endif
  return launch_on_cpu(plan, params, context);
}

size_t max_workspace_bytes(const StepParams& largest, const Device& device) {
  if (!validate(largest).ok()) return 0;
  size_t bytes = 0;
  Forms forms(largest, device);
  const AttentionStep& step = forms.form(false);  // a cache that is read as it is needs less
  const StepParams& problem = step.problem();
  for (const Kernel& kernel : kTable) {
    Plan plan;
    if (kernel.device != device.type) continue;
    if (kernel.max_workspace_bytes != nullptr) {
      const size_t own = kernel.max_workspace_bytes(problem, device);
      bytes = std::max(bytes, align(own) + lse_bytes(problem, fills_empty_rows(problem, device)) + step.bytes());
    } else if (plan_with(kernel, &forms, &plan, nullptr)) {
      // Where this plan writes empty rows itself, that of a smaller problem may leave them to a kernel that needs their lse.
      bytes = std::max(bytes, align(plan.workspace_bytes) + lse_bytes(problem, plan.writes_empty_rows));
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

std::string explain(const StepParams& params, const Device& device) {
  if (Status status = validate(params); !status.ok()) return "no kernel: " + status.sentence;
  std::string text;
  const Kernel* chosen = nullptr;
  Forms forms(params, device);
  for (const Kernel& kernel : kTable) {
    Plan plan;
    std::string sentence;
    const bool can = plan_with(kernel, &forms, &plan, &sentence);
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
