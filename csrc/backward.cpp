// SPDX-License-Identifier: Apache-2.0
// The backward pass's rules, its table of kernels, and its launch. Called through fa/backward.h by the adapters.
#include "backward.h"

#include <cstring>

#include "cpu/backward_cpu.h"
#include "rules.h"
#ifdef FA_WITH_CUDA
#include "kernels/backward_kernels.h"
#endif

namespace fa {
namespace {

// clang-format off
const BackwardKernel kTable[] = {
    {"backward_cpu", DeviceType::kCpu, cpu::plan_backward, cpu::launch_backward},
#ifdef FA_WITH_CUDA
    FA_CUDA_BACKWARD_KERNELS
#endif
};
// clang-format on

Status unsupported(const char* sentence) { return {StatusCode::kUnsupported, sentence}; }

/// What only inference uses.
Status check_problem(const StepParams& p) {
  if (p.cache.new_key.present || p.cache.mode != CacheMode::kAppend)
    return unsupported("there is no backward pass through a cache (past_key, past_value); give whole keys and values");
  if (p.rotary.cos.present || p.norm.query_weight.present || p.norm.key_weight.present)
    return unsupported("there is no backward pass through cos_cache and q_norm_weight; rotate and normalise before the call");
  if (p.query_bias.present) return unsupported("there is no backward pass through query_bias; add it to query before the call");
  if (p.empty_row != EmptyRow::kZero)
    return unsupported(
        p.empty_row == EmptyRow::kMean
            ? "there is no backward pass with empty_row 'mean'; expected 'zero', with which empty rows get gradient 0"
            : "there is no backward pass with empty_row_value; without it empty rows get gradient 0");
  if (is_float8(p.query.dtype)) return unsupported("there is no backward pass in float8; expected float32, float16 or bfloat16");
  FA_RULE(p.lse.present, "lse is missing; the backward pass needs what the forward pass has written");
  return {};
}

/// A gradient that is written: of the shape and dtype of what it belongs to.
Status check_gradient(const char* name, const TensorView& gradient, const TensorView& of, const char* of_name) {
  FA_CHECK(check_operand(name, gradient));
  FA_RULE(gradient.dtype == of.dtype, has_dtype(name, gradient, name_of(of.dtype)) + " " + of_name);
  FA_CHECK(check_shape(name, gradient, of.shape, 4, of_name));
  return check_written(name, gradient, 4);
}

Status check_optional(const StepParams& p, const Gradients& g) {
  if (g.d_lse.present) {
    FA_RULE(g.d_lse.dtype == DType::kFloat32, has_dtype("d_lse", g.d_lse, "float32"));
    FA_CHECK(check_shape("d_lse", g.d_lse, p.lse.shape, 3, "batch, heads and rows of query"));
  }
  if (g.d_bias.present) {
    FA_RULE(p.bias.present, "d_bias is given, but there is no bias");
    FA_RULE(g.d_bias.dtype == DType::kFloat32, has_dtype("d_bias", g.d_bias, "float32"));
    FA_CHECK(check_shape("d_bias", g.d_bias, p.bias.shape, 4, "as bias"));
    FA_CHECK(check_sums("d_bias", g.d_bias, 4));
  }
  if (g.d_sinks.present) {
    FA_RULE(p.sinks.present, "d_sinks is given, but there are no sinks");
    FA_RULE(g.d_sinks.dtype == DType::kFloat32, has_dtype("d_sinks", g.d_sinks, "float32"));
    FA_CHECK(check_shape("d_sinks", g.d_sinks, p.sinks.shape, 1, "query heads"));
    FA_CHECK(check_written("d_sinks", g.d_sinks, 1));
  }
  return {};
}

/// Does the kernel take the problem? On success the plan is complete; else *why_not, where given, says why not.
bool plan_with(const BackwardKernel& kernel, const StepParams& params, const Gradients& gradients, const Device& device,
               BackwardPlan* plan, std::string* why_not) {
  FA_REFUSE_IF(kernel.device != device.type,
               kernel.device == DeviceType::kCpu ? "runs on the CPU only" : "runs on CUDA devices only");
  *plan = {};
  plan->device = device;
  if (!kernel.plan(params, gradients, plan, why_not)) return false;
  plan->kernel = &kernel;
  return true;
}

/// Why no kernel, or not the one of this name, takes the problem.
std::string refusals(const StepParams& params, const Gradients& gradients, const Device& device, const char* name) {
  std::string text, names;
  for (const BackwardKernel& kernel : kTable) {
    names += std::string(" ") + kernel.name;
    if (name != nullptr ? std::strcmp(name, kernel.name) != 0 : kernel.device != device.type) continue;
    BackwardPlan unused;
    std::string sentence;
    plan_with(kernel, params, gradients, device, &unused, &sentence);
    text += (text.empty() ? "" : "; ") + std::string(kernel.name) + ": " + sentence;
  }
  if (!text.empty()) return text;
  return name == nullptr ? kNoCuda : "there is no backward kernel '" + std::string(name) + "'; there are" + names;
}

}  // namespace

Status validate_backward(const StepParams& params, const Gradients& gradients) {
  FA_CHECK(check_problem(params));
  FA_CHECK(validate(params));
  FA_CHECK(check_operand("d_out", gradients.d_out));
  FA_RULE(gradients.d_out.dtype == params.query.dtype,
          has_dtype("d_out", gradients.d_out, name_of(params.query.dtype)) + " as query");
  FA_CHECK(check_shape("d_out", gradients.d_out, params.out.shape, 4, "as out"));
  FA_CHECK(check_gradient("d_query", gradients.d_query, params.query, "as query"));
  FA_CHECK(check_gradient("d_key", gradients.d_key, params.key, "as key"));
  FA_CHECK(check_gradient("d_value", gradients.d_value, params.value, "as value"));
  return check_optional(params, gradients);
}

Status plan_backward(const StepParams& params, const Gradients& gradients, const Device& device, BackwardPlan* plan,
                     const char* kernel) {
  *plan = {};
  if (Status status = validate_backward(params, gradients); !status.ok()) return status;
  for (const BackwardKernel& row : kTable) {
    if (kernel != nullptr && std::strcmp(kernel, row.name) != 0) continue;
    if (plan_with(row, params, gradients, device, plan, nullptr)) return {};
  }
  *plan = {};
  return {StatusCode::kUnsupported, refusals(params, gradients, device, kernel)};
}

Status launch_backward(const BackwardPlan& plan, const StepParams& params, const Gradients& gradients,
                       const ExecutionContext& context) {
  if (plan.kernel == nullptr)
    return {StatusCode::kInvalidArgument, "there is no plan: plan_backward() was not called or has failed"};
  FA_CHECK(check_workspace(plan.kernel->name, plan.workspace_bytes, context));
  FA_CHECK(check_memory(params, gradients));
  return plan.kernel->launch(plan, params, gradients, context);
}

const char* backward_kernel_name(DeviceType type, int idx) {
  for (const BackwardKernel& kernel : kTable) {
    if (kernel.device == type && idx-- == 0) return kernel.name;
  }
  return nullptr;
}

}  // namespace fa
