// SPDX-License-Identifier: Apache-2.0
// What lies between a tile of products and its weights: scale, softcap, bias, ALiBi, masks, and the exponential against the row's
// log-sum-exp. Tiles are transposed: rows are keys, columns are query rows.
#pragma once

#include "kernels/backward_sm80/tile_work.cuh"
#include "kernels/common/convert.cuh"
#include "kernels/common/exp2.cuh"
#include "semantics/softmax.h"

namespace fa::backward_sm80 {

/// A lane's place in a tile of scores: its first key and its first row.
struct TileCorner {
  int key, row;
};

/// The rows that see a key of a band: those from `first` on, `count` of them.
struct SeenRows {
  int first;
  unsigned count;

  __device__ __forceinline__ SeenRows(const TileWork& work, int key)
      : first(key - work.band.right + 1),
        count(key < work.num_keys ? static_cast<unsigned>(work.band.right) - static_cast<unsigned>(work.band.left) : 0u) {}
  __device__ __forceinline__ bool has(int row) const { return static_cast<unsigned>(row - first) < count; }
};

/// Calls work(m, n, i, key, row) for each element of a lane's part of a tile.
template <int kKeyBlocks, int kRowBlocks, class Work>
__device__ __forceinline__ void for_elements(TileCorner corner, const Work& work) {
#pragma unroll
  for (int m = 0; m < kKeyBlocks; ++m) {
#pragma unroll
    for (int n = 0; n < kRowBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) work(m, n, i, corner.key + 16 * m + i / 2 * 8, corner.row + 8 * n + i % 2);
    }
  }
}

/// `hidden` for keys that lengths and windows hide.
template <int kKeyBlocks, int kRowBlocks>
__device__ __forceinline__ void hide(float (&values)[kKeyBlocks][kRowBlocks][4], const TileWork& work, TileCorner corner,
                                     float hidden) {
#pragma unroll
  for (int m = 0; m < kKeyBlocks; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const SeenRows seen(work, corner.key + 16 * m + 8 * r);
#pragma unroll
      for (int n = 0; n < kRowBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (!seen.has(corner.row + 8 * n + e)) values[m][n][2 * r + e] = hidden;
        }
      }
    }
  }
}

/// `convert`: from B to float.
template <class B, int kKeyBlocks, int kRowBlocks, class Convert>
__device__ __forceinline__ void add_bias_of(float (&scores)[kKeyBlocks][kRowBlocks][4], const TensorView& bias, const B* data,
                                            int num_rows, TileCorner corner, const Convert& convert) {
  for_elements<kKeyBlocks, kRowBlocks>(corner, [&](int m, int n, int i, int key, int row) {
    if (row >= num_rows) return;
    scores[m][n][i] += key < bias.shape[3] ? convert(__ldg(data + row * bias.stride[2] + key * bias.stride[3])) : -INFINITY;
  });
}

template <int kKeyBlocks, int kRowBlocks>
__device__ __forceinline__ void add_bias(float (&scores)[kKeyBlocks][kRowBlocks][4], const TensorView& bias, int64_t b, int head,
                                         int num_rows, TileCorner corner) {
  const int64_t first = b * bias.stride[0] + head * bias.stride[1];
  if (bias.dtype == DType::kFloat32) {
    add_bias_of(scores, bias, static_cast<const float*>(bias.data) + first, num_rows, corner, [](float x) { return x; });
  } else {
    const bool is_half = bias.dtype == DType::kFloat16;
    add_bias_of(scores, bias, static_cast<const uint16_t*>(bias.data) + first, num_rows, corner,
                [&](uint16_t x) { return unpack2(x, is_half).x; });
  }
}

/// From products to natural scores, -inf for keys that a row doesn't see. `tanh`: of softcap, 0 without.
template <int kKeyBlocks, int kRowBlocks>
__device__ __forceinline__ void modify(float (&scores)[kKeyBlocks][kRowBlocks][4], float (&tanh)[kKeyBlocks][kRowBlocks][4],
                                       const AttentionParams& p, const TileWork& work, int head, TileCorner corner) {
  const int64_t b = work.sequence.batch_idx;
  const int num_rows = static_cast<int>(work.sequence.query_length);
  if (p.softcap != 0.0f) {
    const float scale = p.softmax_scale / p.softcap;
    for_elements<kKeyBlocks, kRowBlocks>(corner, [&](int m, int n, int i, int, int) {
      tanh[m][n][i] = TanhByExp2{}(scores[m][n][i] * scale);
      scores[m][n][i] = p.softcap * tanh[m][n][i];
    });
  } else {
    for_elements<kKeyBlocks, kRowBlocks>(corner, [&](int m, int n, int i, int, int) {
      tanh[m][n][i] = 0.0f;
      scores[m][n][i] *= p.softmax_scale;
    });
  }
  if (p.bias.present) add_bias(scores, p.bias, b, head, num_rows, corner);
  if (p.alibi_slopes.present) {
    const int64_t at = work.sequence_idx * p.alibi_slopes.stride[0] + head * p.alibi_slopes.stride[1];
    const float slope = static_cast<const float*>(p.alibi_slopes.data)[at];
    const float distance = static_cast<float>(corner.row + work.sequence.mask.query_offset - corner.key);  // in the corner
    for_elements<kKeyBlocks, kRowBlocks>(corner, [&](int m, int n, int i, int key, int row) {
      const float further = static_cast<float>((row - corner.row) - (key - corner.key));
      scores[m][n][i] = fmaf(-slope, fabsf(distance + further), scores[m][n][i]);
    });
  }
  if (p.mask.present) {
    const TensorView& mask = p.mask;
    const uint8_t* data = static_cast<const uint8_t*>(mask.data) + b * mask.stride[0] + head * mask.stride[1];
    for_elements<kKeyBlocks, kRowBlocks>(corner, [&](int m, int n, int i, int key, int row) {
      if (row >= num_rows) return;
      if (key >= mask.shape[3] || __ldg(data + row * mask.stride[2] + key * mask.stride[3]) == 0) scores[m][n][i] = -INFINITY;
    });
  }
}

/// A lane's numbers of rows, in shared memory; two for each 8 rows.
struct NumbersOfRows {
  const float *reference, *delta, *rest;

  static __device__ __forceinline__ float2 pair(const float* numbers, int row_block) {
    return *reinterpret_cast<const float2*>(numbers + 8 * row_block);
  }
};

/// scores become weights.
template <bool kModified, int kKeyBlocks, int kRowBlocks>
__device__ __forceinline__ void exponentials(float (&scores)[kKeyBlocks][kRowBlocks][4], const NumbersOfRows& rows,
                                             float scale_log2) {
#pragma unroll
  for (int n = 0; n < kRowBlocks; ++n) {
    const float2 reference = NumbersOfRows::pair(rows.reference, n);
    float2 rest = make_float2(0.0f, 0.0f);
    if constexpr (kModified) rest = NumbersOfRows::pair(rows.rest, n);
#pragma unroll
    for (int m = 0; m < kKeyBlocks; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& score = scores[m][n][i];
        const float of_row = i % 2 == 0 ? reference.x : reference.y;
        if constexpr (kModified) {
          const float weight = exp2_approx(fmaf(score - of_row, kLog2E, i % 2 == 0 ? -rest.x : -rest.y));
          score = score == -INFINITY ? 0.0f : weight;
        } else {
          score = exp2_approx(fmaf(score, scale_log2, -of_row));
        }
      }
    }
  }
}

/// products dO V^T become gradients of the scores, of which `scores` are the weights.
template <int kKeyBlocks, int kRowBlocks>
__device__ __forceinline__ void differentiate(const float (&weights)[kKeyBlocks][kRowBlocks][4],
                                              float (&products)[kKeyBlocks][kRowBlocks][4], const NumbersOfRows& rows) {
#pragma unroll
  for (int n = 0; n < kRowBlocks; ++n) {
    const float2 delta = NumbersOfRows::pair(rows.delta, n);
#pragma unroll
    for (int m = 0; m < kKeyBlocks; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) products[m][n][i] = weights[m][n][i] * (products[m][n][i] - (i % 2 == 0 ? delta.x : delta.y));
    }
  }
}

}  // namespace fa::backward_sm80
