// SPDX-License-Identifier: Apache-2.0
// The ordered table of kernels: the first that supports a problem on a device runs it. explain() prints what the table says.
// Called through fa/attention.h by the adapters.
#include "dispatch.h"

#include <algorithm>
#include <cstring>

#include "cpu/attention_cpu.h"
#ifdef FA_WITH_CUDA
#include "kernels/kernels.h"
#endif

namespace fa {
namespace {

// clang-format off
const Kernel kTable[] = {
    {"cpu", DeviceType::kCpu, cpu::supports, cpu::workspace_bytes, cpu::launch},
#ifdef FA_WITH_CUDA
    FA_CUDA_KERNELS
#endif
};
// clang-format on

constexpr const char* kNoCuda = "this build has no CUDA kernels (it was made without nvcc)";

std::string refusal(const Kernel& kernel, const AttentionParams& params, const DeviceInfo& device) {
  if (kernel.device != device.type)
    return kernel.device == DeviceType::kCpu ? "runs on the CPU only" : "runs on CUDA devices only";
  return kernel.supports(params, device);
}

/// The kernel that runs the problem, or null and the sentence that says why there is none.
const Kernel* choose(const AttentionParams& params, const DeviceInfo& device, const char* name, std::string* why_not) {
  bool known = false;
  for (const Kernel& kernel : kTable) {
    if (name != nullptr && std::strcmp(name, kernel.name) != 0) continue;
    known = true;
    const std::string sentence = refusal(kernel, params, device);
    if (sentence.empty()) return &kernel;
    if (name != nullptr || kernel.device == device.type)
      *why_not += (why_not->empty() ? "" : "; ") + std::string(kernel.name) + ": " + sentence;
  }
  if (name != nullptr && !known) {
    *why_not = "there is no kernel '" + std::string(name) + "'; there are";
    for (const Kernel& kernel : kTable) *why_not += std::string(" ") + kernel.name;
  }
  if (why_not->empty()) *why_not = kNoCuda;
  return nullptr;
}

}  // namespace

Status attention_forward(const AttentionParams& params, const ExecutionContext& context) {
  if (Status status = validate(params); !status.ok()) return status;
  std::string why_not;
  const Kernel* kernel = choose(params, context.device, context.kernel, &why_not);
  if (kernel == nullptr) return {StatusCode::kUnsupported, why_not};
  const size_t needed = kernel->workspace_bytes(params, context.device);
  if (needed > context.workspace_bytes || (needed > 0 && context.workspace == nullptr)) {
    return {StatusCode::kInvalidArgument, std::string(kernel->name) + " needs a workspace of " + std::to_string(needed) +
                                              " bytes, but the context has " + std::to_string(context.workspace_bytes)};
  }
  if (params.out.empty()) return {};  // also where a kernel could not describe a tensor without elements
  return kernel->launch(params, context);
}

size_t workspace_bytes(const AttentionParams& params, const DeviceInfo& device, const char* kernel) {
  if (!validate(params).ok()) return 0;
  std::string why_not;
  const Kernel* chosen = choose(params, device, kernel, &why_not);
  return chosen == nullptr ? 0 : chosen->workspace_bytes(params, device);
}

size_t max_workspace_bytes(const AttentionParams& largest, const DeviceInfo& device) {
  if (!validate(largest).ok()) return 0;
  size_t bytes = 0;
  for (const Kernel& kernel : kTable) {
    if (kernel.device != device.type) continue;
    if (kernel.max_workspace_bytes != nullptr) {
      bytes = std::max(bytes, kernel.max_workspace_bytes(largest, device));
    } else if (kernel.supports(largest, device).empty()) {
      bytes = std::max(bytes, kernel.workspace_bytes(largest, device));
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

std::string explain(const AttentionParams& params, const DeviceInfo& device) {
  if (Status status = validate(params); !status.ok()) return "no kernel: " + status.sentence;
  std::string text;
  const Kernel* chosen = nullptr;
  for (const Kernel& kernel : kTable) {
    const std::string sentence = refusal(kernel, params, device);
    const char* verdict = chosen == nullptr ? "runs this problem" : "could run it, but comes later in the table";
    text += std::string(text.empty() ? "" : "\n") + kernel.name + ": " + (sentence.empty() ? verdict : sentence);
    if (chosen == nullptr && sentence.empty()) chosen = &kernel;
  }
  if (kernel_name(device.type, 0) == nullptr) text += std::string("\n") + kNoCuda;
  return (chosen == nullptr ? "no kernel" : chosen->name) + std::string(chosen == nullptr ? "\n" : ": chosen\n") + text;
}

#ifndef FA_WITH_CUDA
Status query_cuda_device(DeviceInfo*) { return {StatusCode::kUnsupported, kNoCuda}; }
#endif

}  // namespace fa
