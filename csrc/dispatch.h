// SPDX-License-Identifier: Apache-2.0
// What a kernel tells of itself, for the ordered table in dispatch.cpp. A new kernel is one folder and one row there.
#pragma once

#include <cstddef>
#include <string>

#include "fa/attention.h"

namespace fa {

struct Kernel {
  const char* name;   // its folder, and the word in explain(), NVTX ranges and test ids
  DeviceType device;  // the others refuse themselves

  /// The sentence that says why not; empty where the kernel can do it. params are valid (validate.cpp).
  std::string (*supports)(const AttentionParams& params, const DeviceInfo& device);
  size_t (*workspace_bytes)(const AttentionParams& params, const DeviceInfo& device);
  /// Called only where supports() said yes and the workspace is large enough.
  Status (*launch)(const AttentionParams& params, const ExecutionContext& context);
  /// As fa::max_workspace_bytes, of this kernel; null where workspace_bytes grows with the sizes.
  size_t (*max_workspace_bytes)(const AttentionParams& largest, const DeviceInfo& device) = nullptr;
};

}  // namespace fa
