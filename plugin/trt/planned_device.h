// SPDX-License-Identifier: Apache-2.0
// For which GPU an engine plans that was built on one and runs on another (hardware compatibility). Used by plugin.cpp,
// workspace.cpp and the tests' host.
#pragma once

#include <algorithm>

#include "fa/attention.h"

namespace fa::trt {

/// The newest compute capability whose kernels run on every later GPU. From 9.0 on a GPU has kernels of its own (sm_90a), which
/// run on no other, later ones included.
inline constexpr int kPortableCapability = 89;

/// The same GPU, but for kernels that only GPUs of its kind have.
inline Device portable(Device device) {
  device.compute_capability = std::min(device.compute_capability, kPortableCapability);
  return device;
}

/// An engine that was built on `built_on` runs on `actual`. Which kernel runs and into how many parts it splits the keys depends
/// on the GPU, and so does the memory they need: so the choice stays what it was, as far as the GPU can.
inline Device planned_device(const Device& built_on, const Device& actual) {
  Device device = built_on.compute_capability == actual.compute_capability ? built_on : portable(built_on);
  device.compute_capability = std::min(device.compute_capability, actual.compute_capability);
  device.shared_memory_bytes = std::min(device.shared_memory_bytes, actual.shared_memory_bytes);
  return device;
}

}  // namespace fa::trt
