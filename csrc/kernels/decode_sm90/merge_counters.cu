// SPDX-License-Identifier: Apache-2.0
// See merge_counters.h.
#include "kernels/common/workspace_numbers.h"
#include "kernels/decode_sm90/merge_counters.h"

namespace fa::decode_sm90 {
namespace {

constexpr size_t kNumWorkspaces = 256;

__device__ unsigned counters_of_all[kNumWorkspaces][kNumCounters];  // 576 KB; the loader makes them 0

}  // namespace

cudaError_t find_merge_counters(const ExecutionContext& context, unsigned** counters) {
  static WorkspaceNumbers numbers(kNumWorkspaces);
  const size_t number = numbers.at(context.workspace);
  if (number == kNumWorkspaces) {
    *counters = static_cast<unsigned*>(context.workspace);
    return cudaMemsetAsync(*counters, 0, kCounterBytes, static_cast<cudaStream_t>(context.stream));
  }
  void* first = nullptr;
  const cudaError_t error = cudaGetSymbolAddress(&first, counters_of_all);
  if (error == cudaSuccess) *counters = static_cast<unsigned*>(first) + number * kNumCounters;
  return error;
}

}  // namespace fa::decode_sm90
