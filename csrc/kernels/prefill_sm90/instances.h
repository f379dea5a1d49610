// SPDX-License-Identifier: Apache-2.0
// Declares what the generated sources define, so that the host compiler needs no kernel code.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "fa/attention.h"

namespace fa::prefill_sm90 {

// Shared memory in bytes: of a multiprocessor, what the system takes of it for each block, and what an instance may take.
inline constexpr int kSharedOfSm = 228 * 1024, kReservedShared = 1024;
inline constexpr int kSharedLimit = kSharedOfSm - kReservedShared;

enum class Variant : uint8_t {
  kPlain,          // scale > 0, lengths, window, sinks, mask without rows: scores stay raw products, the scale is in the exponent
  kTall,           // the same problems, with tiles of more rows and fewer keys
  kMiddle,         // … with tiles of fewer rows
  kBroad,          // … with tiles of fewer rows and more keys
  kShort,          // … with tiles for few keys or few rows
  kModified,       // on top of it softcap, bias, mask with rows, ALiBi, or a scale <= 0: scores are natural
  kModifiedTall,   // … with tiles of more rows and fewer keys; without mask, and without a bias that only threads can read
  kModifiedShort,  // … with tiles for few keys or few rows, or for a bias that only threads can read
};

constexpr bool modifies_scores(Variant variant) { return variant >= Variant::kModified; }

template <typename T, int kHeadDim, Variant kVariant>
Status launch_instance(const Plan& plan, const AttentionParams& params, const ExecutionContext& context);

}  // namespace fa::prefill_sm90
