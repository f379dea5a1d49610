// SPDX-License-Identifier: Apache-2.0
// Division by a number known at launch, as a multiplication (Granlund & Montgomery 1994). Made on the host, used by the kernels.
#pragma once

#include <cstdint>

namespace fa {

/// Exact for 0 <= n < 2^31 and 0 < divisor < 2^31.
struct Divisor {
  uint32_t divisor = 1, multiplier = 0, shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t d) : divisor(static_cast<uint32_t>(d)) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1);
  }

#if defined(__CUDACC__)
  __device__ __forceinline__ uint32_t quotient(uint32_t n) const { return (__umulhi(n, multiplier) + n) >> shift; }
#endif
};

}  // namespace fa
