// SPDX-License-Identifier: Apache-2.0
// Warp-wide matrix products (mma.sync) and the loads that feed them (ldmatrix), sm_80 and later.
// Lane l: group g = l / 4, place t = l % 4. An accumulator of m16n8 holds (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fa {

/// Four 8 x 16-byte matrices; lane l gives the shared-memory address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

/// The same, each 8x8 matrix of 16-bit elements transposed.
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

/// c[16, 8] += a[16, 16] b[16, 8], float32 accumulators.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (sizeof(T) == 2 && __is_same(T, __half)) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

/// c[16, 8] += a[16, 8] b[8, 8], TF32 operands. a: (g, t), (g+8, t), (g, t+4), (g+8, t+4); b: (t, g), (t+4, g).
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// x = high + low, each exact in TF32 (11 significant bits), to 2^-22 of x.
__device__ __forceinline__ void split_tf32(uint32_t x, uint32_t& high, uint32_t& low) {
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(high) : "f"(__uint_as_float(x)));
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(low) : "f"(__uint_as_float(x) - __uint_as_float(high)));
}

/// c += a b for float32 operands: three TF32 products (3xTF32), the small ones first; low·low is below float32's rounding.
__device__ __forceinline__ void mma_m16n8k8_3xtf32(float (&c)[4], const uint32_t (&a_high)[4], const uint32_t (&a_low)[4],
                                                   uint32_t b0, uint32_t b1) {
  uint32_t b0_high, b0_low, b1_high, b1_low;
  split_tf32(b0, b0_high, b0_low);
  split_tf32(b1, b1_high, b1_low);
  mma_m16n8k8_tf32(c, a_low, b0_high, b1_high);
  mma_m16n8k8_tf32(c, a_high, b0_low, b1_low);
  mma_m16n8k8_tf32(c, a_high, b0_high, b1_high);
}

}  // namespace fa
