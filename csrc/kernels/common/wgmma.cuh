// SPDX-License-Identifier: Apache-2.0
// Warpgroup matrix products (wgmma, sm_90a): D[64, N] += A[64, 16] B[16, N], float32 sums of float16 or bfloat16 products.
// Used by prefill_sm90. Operands in shared memory stand in panels of 128-byte rows (64 elements) under the 128-byte swizzle.
// Thread t of a warpgroup holds of D: rows 16 (t / 32) + (t % 32) / 4 (+ 8 for elements 2, 3), columns 8 i + 2 (t % 4) (+ 1) in
// d[4 i + 0 … 3]; two neighbouring groups of eight columns of D, converted in pairs, are the A fragment of a later product.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace fa {

/// Descriptor of an operand whose rows (64 contiguous elements of the summed axis) are 128 bytes: 8 rows every 1024 bytes.
__device__ __forceinline__ uint64_t wgmma_descriptor_k_major(uint32_t shared) {
  return (uint64_t{1} << 62) | (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 16) | ((shared & 0x3FFFF) >> 4);
}

/// Descriptor of an operand whose rows run along the other axis (V: a row is a key): panels of 64 columns, panel_bytes apart.
__device__ __forceinline__ uint64_t wgmma_descriptor_mn_major(uint32_t shared, uint32_t panel_bytes) {
  return (uint64_t{1} << 62) | (uint64_t{1024 >> 4} << 32) | (static_cast<uint64_t>(panel_bytes >> 4) << 16) |
         ((shared & 0x3FFFF) >> 4);
}

/// Orders the registers written so far before the products that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/// Waits until at most kPending committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// Keeps the compiler from moving uses of registers that a product owns across this point.
template <typename R, int kCount>
__device__ __forceinline__ void wgmma_pin(R (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (std::is_same_v<R, float>) {
      asm volatile("" : "+f"(registers[i])::"memory");
    } else {
      asm volatile("" : "+r"(registers[i])::"memory");
    }
  }
}

/// One instruction, N columns. accumulate = 0 starts the sum. ss: A and B from shared memory; rs: A from registers. kMnMajor,
/// kAMnMajor: B, A stands row-wise along the other axis (wgmma_descriptor_mn_major), else along the summed one.
template <int kN>
struct Wgmma;

// The operand lists: PTX numbers them, so that each N needs its own text.
#define FA_R8(a, b, c, d, e, f, g, h) "%" #a ",%" #b ",%" #c ",%" #d ",%" #e ",%" #f ",%" #g ",%" #h
#define FA_L8 FA_R8(0, 1, 2, 3, 4, 5, 6, 7)
#define FA_L16 FA_L8 "," FA_R8(8, 9, 10, 11, 12, 13, 14, 15)
#define FA_L24 FA_L16 "," FA_R8(16, 17, 18, 19, 20, 21, 22, 23)
#define FA_L32 FA_L24 "," FA_R8(24, 25, 26, 27, 28, 29, 30, 31)
#define FA_L40 FA_L32 "," FA_R8(32, 33, 34, 35, 36, 37, 38, 39)
#define FA_L48 FA_L40 "," FA_R8(40, 41, 42, 43, 44, 45, 46, 47)
#define FA_L56 FA_L48 "," FA_R8(48, 49, 50, 51, 52, 53, 54, 55)
#define FA_L64 FA_L56 "," FA_R8(56, 57, 58, 59, 60, 61, 62, 63)
#define FA_L72 FA_L64 "," FA_R8(64, 65, 66, 67, 68, 69, 70, 71)
#define FA_L80 FA_L72 "," FA_R8(72, 73, 74, 75, 76, 77, 78, 79)
#define FA_L88 FA_L80 "," FA_R8(80, 81, 82, 83, 84, 85, 86, 87)
#define FA_L96 FA_L88 "," FA_R8(88, 89, 90, 91, 92, 93, 94, 95)
#define FA_L104 FA_L96 "," FA_R8(96, 97, 98, 99, 100, 101, 102, 103)
#define FA_L112 FA_L104 "," FA_R8(104, 105, 106, 107, 108, 109, 110, 111)
#define FA_L120 FA_L112 "," FA_R8(112, 113, 114, 115, 116, 117, 118, 119)
#define FA_L128 FA_L120 "," FA_R8(120, 121, 122, 123, 124, 125, 126, 127)

#define FA_REGISTERS8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define FA_D8 FA_REGISTERS8(0)
#define FA_D16 FA_REGISTERS8(0), FA_REGISTERS8(8)
#define FA_D24 FA_D16, FA_REGISTERS8(16)
#define FA_D32 FA_D24, FA_REGISTERS8(24)
#define FA_D40 FA_D32, FA_REGISTERS8(32)
#define FA_D48 FA_D40, FA_REGISTERS8(40)
#define FA_D56 FA_D48, FA_REGISTERS8(48)
#define FA_D64 FA_D56, FA_REGISTERS8(56)
#define FA_D72 FA_D64, FA_REGISTERS8(64)
#define FA_D80 FA_D72, FA_REGISTERS8(72)
#define FA_D88 FA_D80, FA_REGISTERS8(80)
#define FA_D96 FA_D88, FA_REGISTERS8(88)
#define FA_D104 FA_D96, FA_REGISTERS8(96)
#define FA_D112 FA_D104, FA_REGISTERS8(104)
#define FA_D120 FA_D112, FA_REGISTERS8(112)
#define FA_D128 FA_D120, FA_REGISTERS8(120)

#define FA_WGMMA_SS(N, R, TYPE, i0, i1, i2, i3, i4)                                                                           \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE \
               " {" FA_L##R "}, %" #i0 ", %" #i1 ", p, 1, 1, %" #i4 ", %" #i3 ";\n}"                                          \
               : FA_D##R                                                                                                      \
               : "l"(a), "l"(b), "r"(accumulate), "n"(kMnMajor ? 1 : 0), "n"(kAMnMajor ? 1 : 0))
#define FA_WGMMA_RS(N, R, TYPE, i0, i1, i2, i3, i4, i5, i6)                                                                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE \
               " {" FA_L##R "}, {%" #i0 ",%" #i1 ",%" #i2 ",%" #i3 "}, %" #i4 ", p, 1, 1, %" #i6 ";\n}"                       \
               : FA_D##R                                                                                                      \
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate), "n"(kMnMajor ? 1 : 0))
#define FA_WGMMA(N, R, i0, i1, i2, i3, i4, i5, i6)                                                                           \
  template <>                                                                                                                \
  struct Wgmma<N> {                                                                                                          \
    template <typename T, bool kMnMajor = false, bool kAMnMajor = false>                                                     \
    static __device__ __forceinline__ void ss(float (&d)[R], uint64_t a, uint64_t b, int accumulate) {                       \
      if constexpr (std::is_same_v<T, __half>) {                                                                             \
        FA_WGMMA_SS(N, R, "f16", i0, i1, i2, i3, i4);                                                                        \
      } else {                                                                                                               \
        FA_WGMMA_SS(N, R, "bf16", i0, i1, i2, i3, i4);                                                                       \
      }                                                                                                                      \
    }                                                                                                                        \
    template <typename T, bool kMnMajor = true>                                                                              \
    static __device__ __forceinline__ void rs(float (&d)[R], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b, \
                                              int accumulate) {                                                              \
      if constexpr (std::is_same_v<T, __half>) {                                                                             \
        FA_WGMMA_RS(N, R, "f16", i0, i1, i2, i3, i4, i5, i6);                                                                \
      } else {                                                                                                               \
        FA_WGMMA_RS(N, R, "bf16", i0, i1, i2, i3, i4, i5, i6);                                                               \
      }                                                                                                                      \
    }                                                                                                                        \
  }

FA_WGMMA(16, 8, 8, 9, 10, 11, 12, 13, 14);
FA_WGMMA(32, 16, 16, 17, 18, 19, 20, 21, 22);
FA_WGMMA(48, 24, 24, 25, 26, 27, 28, 29, 30);
FA_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38);
FA_WGMMA(80, 40, 40, 41, 42, 43, 44, 45, 46);
FA_WGMMA(96, 48, 48, 49, 50, 51, 52, 53, 54);
FA_WGMMA(112, 56, 56, 57, 58, 59, 60, 61, 62);
FA_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70);
FA_WGMMA(144, 72, 72, 73, 74, 75, 76, 77, 78);
FA_WGMMA(160, 80, 80, 81, 82, 83, 84, 85, 86);
FA_WGMMA(176, 88, 88, 89, 90, 91, 92, 93, 94);
FA_WGMMA(192, 96, 96, 97, 98, 99, 100, 101, 102);
FA_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134);

#undef FA_WGMMA
#undef FA_WGMMA_RS
#undef FA_WGMMA_SS

}  // namespace fa
