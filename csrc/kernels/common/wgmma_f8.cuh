// SPDX-License-Identifier: Apache-2.0
// Warpgroup matrix products of float8 operands (wgmma, sm_90a): D[64, N] += A[64, 32] B[32, N] of e4m3. Used by prefill_sm90_f8.
// Both operands stand along the summed axis in shared memory (rows of 128 elements, 128 bytes, under the 128-byte swizzle;
// wgmma_descriptor_k_major), since only 16-bit elements can be transposed on the way. Thread t of a warpgroup holds of A: rows
// 16 (t / 32) + (t % 32) / 4 (+ 8 in a1, a3), columns 4 (t % 4) … + 3 (+ 16 in a2, a3). D is as in wgmma.cuh, with two
// neighbouring columns to a thread: where D becomes a later A, two groups of eight columns make four neighbours
// (kernels/prefill_sm90_f8/convert.cuh). NOTE: the tensor cores keep about 14 bits of a sum of float8 products.
#pragma once

#include "kernels/common/wgmma.cuh"

namespace fa {

/// One instruction, N columns. accumulate = 0 starts the sum. ss: A and B from shared memory; rs: A from registers.
template <int kN>
struct WgmmaF8;

#define FA_WGMMA_F8(N, R, i0, i1, i2, i3, i4, i5)                                                                            \
  template <>                                                                                                                \
  struct WgmmaF8<N> {                                                                                                        \
    static __device__ __forceinline__ void ss(float (&d)[R], uint64_t a, uint64_t b, int accumulate) {                       \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N                     \
                   "k32.f32.e4m3.e4m3 {" FA_L##R "}, %" #i0 ", %" #i1 ", p, 1, 1;\n}"                                        \
                   : FA_D##R                                                                                                 \
                   : "l"(a), "l"(b), "r"(accumulate));                                                                       \
    }                                                                                                                        \
    static __device__ __forceinline__ void rs(float (&d)[R], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b, \
                                              int accumulate) {                                                              \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N                     \
                   "k32.f32.e4m3.e4m3 {" FA_L##R "}, {%" #i0 ",%" #i1 ",%" #i2 ",%" #i3 "}, %" #i4 ", p, 1, 1;\n}"           \
                   : FA_D##R                                                                                                 \
                   : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate));                                           \
    }                                                                                                                        \
  }

#define FA_L36 FA_L32 ",%32,%33,%34,%35"
#define FA_D36 FA_D32, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])

#define FA_L4 "%0,%1,%2,%3"
#define FA_D4 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
FA_WGMMA_F8(8, 4, 4, 5, 6, 7, 8, 9);
FA_WGMMA_F8(64, 32, 32, 33, 34, 35, 36, 37);
FA_WGMMA_F8(72, 36, 36, 37, 38, 39, 40, 41);
FA_WGMMA_F8(96, 48, 48, 49, 50, 51, 52, 53);
FA_WGMMA_F8(128, 64, 64, 65, 66, 67, 68, 69);

#undef FA_WGMMA_F8
#undef FA_D36
#undef FA_L36

}  // namespace fa
