// SPDX-License-Identifier: Apache-2.0
// Products of float32 numbers by TF32 tensor cores (mma.sync): one product of operands rounded to nearest, or three of operands
// split in two (3xTF32: high·high + high·low + low·high; low·low is below float32's rounding).
// NOTE: tensor cores round sums toward zero. Sums of three products are therefore short: each starts from 0 and is added by the
// FP32 unit, else their error would grow with head_dim and the number of keys.
#pragma once

#include "kernels/common/mma.cuh"

namespace fa {

enum class Tf32 {
  kThree,
  kOne,           // operands are rounded when they are set
  kOneOfRounded,  // operands are TF32 numbers already
};

template <Tf32 kProducts>
struct Tf32Products {
  static constexpr bool kThree = kProducts == Tf32::kThree;

  /// kCount registers of an operand. low is unused but in three products.
  template <int kCount>
  struct Operand {
    uint32_t high[kCount], low[kThree ? kCount : 1];

    __device__ __forceinline__ void set(int i, uint32_t x) {
      if constexpr (kThree) {
        split_tf32(x, high[i], low[i]);
      } else {
        high[i] = kProducts == Tf32::kOne ? round_tf32_away(x) : x;
      }
    }
  };

  /// c += a b, the small products first.
  static __device__ __forceinline__ void multiply(float (&c)[4], const Operand<4>& a, const Operand<2>& b) {
    multiply_apart(c, c, a, b);
  }

  /// The same, the small products into a sum of their own: then c is rounded once, not three times.
  static __device__ __forceinline__ void multiply_apart(float (&c)[4], float (&small)[4], const Operand<4>& a,
                                                        const Operand<2>& b) {
    if constexpr (kThree) {
      mma_m16n8k8_tf32(small, a.low, b.high[0], b.high[1]);
      mma_m16n8k8_tf32(small, a.high, b.low[0], b.low[1]);
    }
    mma_m16n8k8_tf32(c, a.high, b.high[0], b.high[1]);
  }
};

/// Columns of TF32 numbers in a sum of three products, in steps of 8.
constexpr int kStepsOfShortSum = 4;

}  // namespace fa
