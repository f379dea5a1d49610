// SPDX-License-Identifier: Apache-2.0
// Warpgroup matrix products of TF32 operands (wgmma, sm_90a): D[64, N] += A[64, 8] B[8, N], float32 sums. Used by
// prefill_sm90_f32. Both operands stand along the summed axis in shared memory (rows of 32 elements, 128 bytes, under the
// 128-byte swizzle; wgmma_descriptor_k_major): only 16-bit elements can be transposed on the way. The tensor cores ignore the
// last 13 bits of an operand, so what shall be rounded to nearest is rounded before (round_tf32). Thread t of a warpgroup holds
// of A: rows 16 (t / 32) + (t % 32) / 4 (+ 8 in a1, a3), columns t % 4 (+ 4 in a2, a3). D is as in wgmma.cuh, with two
// neighbouring columns to a thread: where D becomes a later A, its even columns go first (transpose.cuh).
#pragma once

#include "kernels/common/wgmma.cuh"

namespace fa {

/// The nearest TF32 number (11 significant bits), as a float32; NaN stays NaN.
__device__ __forceinline__ float round_tf32(float x) {
  uint32_t rounded;
  asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return __uint_as_float(rounded);
}

/// One instruction, N columns. accumulate = 0 starts the sum. ss: A and B from shared memory; rs: A from registers.
template <int kN>
struct WgmmaTf32;

#define FA_WGMMA_TF32(N, R, i0, i1, i2, i3, i4, i5)                                                                          \
  template <>                                                                                                                \
  struct WgmmaTf32<N> {                                                                                                      \
    static __device__ __forceinline__ void ss(float (&d)[R], uint64_t a, uint64_t b, int accumulate) {                       \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N                     \
                   "k8.f32.tf32.tf32 {" FA_L##R "}, %" #i0 ", %" #i1 ", p, 1, 1;\n}"                                         \
                   : FA_D##R                                                                                                 \
                   : "l"(a), "l"(b), "r"(accumulate));                                                                       \
    }                                                                                                                        \
    static __device__ __forceinline__ void rs(float (&d)[R], float a0, float a1, float a2, float a3, uint64_t b,             \
                                              int accumulate) {                                                              \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N                     \
                   "k8.f32.tf32.tf32 {" FA_L##R "}, {%" #i0 ",%" #i1 ",%" #i2 ",%" #i3 "}, %" #i4 ", p, 1, 1;\n}"            \
                   : FA_D##R                                                                                                 \
                   : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)), \
                     "l"(b), "r"(accumulate));                                                                               \
    }                                                                                                                        \
  }

FA_WGMMA_TF32(32, 16, 16, 17, 18, 19, 20, 21);
FA_WGMMA_TF32(64, 32, 32, 33, 34, 35, 36, 37);
FA_WGMMA_TF32(96, 48, 48, 49, 50, 51, 52, 53);
FA_WGMMA_TF32(128, 64, 64, 65, 66, 67, 68, 69);
FA_WGMMA_TF32(192, 96, 96, 97, 98, 99, 100, 101);
FA_WGMMA_TF32(256, 128, 128, 129, 130, 131, 132, 133);

#undef FA_WGMMA_TF32

}  // namespace fa
