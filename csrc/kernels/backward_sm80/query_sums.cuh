// SPDX-License-Identifier: Apache-2.0
// The sums of dQ in device memory. Each element has one thread that adds to it, so the order is always the same; and it adds
// without reading, so it doesn't wait for memory.
#pragma once

#include "kernels/backward_sm80/tile_work.cuh"

namespace fa::backward_sm80 {

/// A thread's part of a tile of dQ.
template <class Config>
struct SumsInMemory {
  using Products = typename Config::Products;
  using Registers = typename Products::QuerySums;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  static constexpr int kWidth = 4;  // elements that one instruction adds
#else
  static constexpr int kWidth = 1;
#endif

  /// Given where the sums of all tiles of rows begin.
  static __device__ __forceinline__ float* place(float* sums, int tile) {
    return sums + int64_t{tile} * (Config::kTileQ * Config::kHeadDim) + threadIdx.x * kWidth;
  }

  /// Calls work(elements, memory) for kWidth elements at a time, which neighbouring threads have side by side.
  template <class Sums, class Work>
  static __device__ __forceinline__ void for_elements(Sums& sums, float* place, const Work& work) {
    constexpr int kColumnBlocks = Products::kQueryColumnBlocks;
#pragma unroll
    for (int i = 0; i < Products::kQueryBlocks * kColumnBlocks; ++i) {
#pragma unroll
      for (int j = 0; j < 4; j += kWidth)
        work(&sums[i / kColumnBlocks][i % kColumnBlocks][j], place + (4 * i + j) * Config::kThreads);
    }
  }

  static __device__ __forceinline__ void load(Registers& sums, float* place) {
    for_elements(sums, place, [](float* x, const float* memory) {
      if constexpr (kWidth == 4) {
        const float4 loaded = __ldcg(reinterpret_cast<const float4*>(memory));
        x[0] = loaded.x, x[1] = loaded.y, x[2] = loaded.z, x[3] = loaded.w;
      } else {
        x[0] = __ldcg(memory);
      }
    });
  }

  static __device__ __forceinline__ void store(const Registers& sums, float* place) {
    for_elements(sums, place, [](const float* x, float* memory) {
      if constexpr (kWidth == 4) {
        __stcg(reinterpret_cast<float4*>(memory), make_float4(x[0], x[1], x[2], x[3]));
      } else {
        __stcg(memory, x[0]);
      }
    });
  }

  static __device__ __forceinline__ void add(const Registers& sums, float* place) {
    for_elements(sums, place, [](const float* x, float* memory) {
      if constexpr (kWidth == 4) {
        asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(memory), "f"(x[0]), "f"(x[1]), "f"(x[2]),
                     "f"(x[3])
                     : "memory");
      } else {
        asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(memory), "f"(x[0]) : "memory");
      }
    });
  }
};

}  // namespace fa::backward_sm80
