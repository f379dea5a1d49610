// SPDX-License-Identifier: Apache-2.0
// Stores to shared memory by its 32-bit address (st.shared).
#pragma once

#include <cstdint>

namespace fa {

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(address), "r"(x) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};\n" ::"r"(address), "f"(x), "f"(y) : "memory");
}

}  // namespace fa
