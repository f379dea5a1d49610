// SPDX-License-Identifier: Apache-2.0
// Numbers of 8 bits as float16, which holds each int8 and each float8 (e4m3) exactly: four in a register become two pairs, the
// operands of matrix instructions. Used by decode_sm90.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/common/convert.cuh"

namespace fa {

/// Which bytes of four become a pair.
enum class BytePairs { kNeighbours, kAlternating };  // 0, 1 and 2, 3; or 0, 2 and 1, 3

/// Stored: int8_t or Float8. A NaN stays one.
template <class Stored, BytePairs kPairs>
__device__ __forceinline__ void widen(uint32_t bytes, uint32_t& first, uint32_t& second) {
  constexpr bool kNeighbours = kPairs == BytePairs::kNeighbours;
  if constexpr (__is_same(Stored, int8_t)) {
    // NOTE: from 1024 to 2047 float16's neighbours differ by 1, so a byte below 0x64 is 1024 plus that byte.
    const uint32_t raised = bytes ^ 0x80808080u;                  // by 128
    const __half2 base = __half2half2(__ushort_as_half(0x6480));  // 1024 + 128
    const uint32_t sums[2] = {__byte_perm(raised, 0x64646464u, kNeighbours ? 0x4140 : 0x4240),
                              __byte_perm(raised, 0x64646464u, kNeighbours ? 0x4342 : 0x4341)};
    const __half2 low = __hsub2(reinterpret_cast<const __half2&>(sums[0]), base);
    const __half2 high = __hsub2(reinterpret_cast<const __half2&>(sums[1]), base);
    first = reinterpret_cast<const uint32_t&>(low);
    second = reinterpret_cast<const uint32_t&>(high);
  } else {
    static_assert(__is_same(Stored, Float8));
    const uint32_t ordered = kNeighbours ? bytes : __byte_perm(bytes, 0, 0x3120);
    asm("{\n"
        ".reg .b16 low, high;\n"
        "mov.b32 {low, high}, %2;\n"
        "cvt.rn.f16x2.e4m3x2 %0, low;\n"
        "cvt.rn.f16x2.e4m3x2 %1, high;\n"
        "}"
        : "=r"(first), "=r"(second)
        : "r"(ordered));
  }
}

}  // namespace fa
