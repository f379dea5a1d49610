// SPDX-License-Identifier: Apache-2.0
// One warp's two matrix products of decode_sm90: 16 rows of queries, which stay in registers, with the keys and values of a
// stage as the copy engine lays them down (panels of 128 bytes of a row, 128-byte swizzle). Keys and values of a quantized cache
// become float16 on their way to an operand, as they are: the scales of keys multiply the queries, those of values the output.
// But int8 keys are operands as they lie where the queries are made whole numbers of two bytes. An ldmatrix brings a lane four
// neighbouring bytes where it would bring two elements, so columns stand in another order: see query_column() and out_column().
#pragma once

#include "kernels/common/convert.cuh"
#include "kernels/common/mma.cuh"
#include "kernels/common/reduce.cuh"
#include "kernels/common/tma.cuh"
#include "kernels/common/widen.cuh"
#include "kernels/decode_sm90/scores.cuh"
#include "kernels/decode_sm90/traits.cuh"

namespace fa::decode_sm90 {

template <class C>
struct Products {
  using T = typename C::T;
  using Operand = typename C::Operand;
  using Scores = float[1][C::kKeyBlocks][4];
  using Weights = uint32_t[1][C::kKeyBlocks][2];
  using Out = float[1][C::kDimBlocks][4];
  static constexpr int kSteps = C::kHeadDim / 16;       // of the sum over columns
  static constexpr int kLoads = C::kRowBytes / 32;      // of a row, 32 bytes each, as one ldmatrix brings them …
  static constexpr int kStepsOfLoad = kSteps / kLoads;  // … and the steps that these have
  static constexpr int kPairs = C::kKeyBlocks / 2;      // of key blocks, which one ldmatrix brings
  static constexpr int kTogether = 4;                   // ldmatrix in flight, since each takes as long as several products
  static constexpr bool kIsWhole = __is_same(typename C::Stored, int8_t);  // keys are, and queries become so too
  using Queries = uint32_t[kSteps][4];

  /// The lane's elements of the warp's queries; 0 for rows and columns that do not exist. `row`: the lane's two rows, null for
  /// none.
  static __device__ __forceinline__ void load_queries(Queries& queries, const T* const (&row)[2], int head_dim) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = query_column(step, i);
        const bool exists = row[i % 2] != nullptr && column < head_dim;
        queries[step][i] = exists ? *reinterpret_cast<const uint32_t*>(row[i % 2] + column) : 0;
      }
    }
  }

  /// Makes operands of the queries, for keys with `scales`. Each row's largest number becomes one below 2^15, so that float16
  /// holds them all as exactly as their own type. With kWhole it becomes one from 2^13 to 2^14, and all are rounded to whole
  /// numbers. factor[row] is what products are to be multiplied by. The second of the lane's rows is left out where the warp has
  /// none: it is 0. Returns false where a number is infinite or NaN, which no whole number stands for.
  template <bool kWhole>
  static __device__ __forceinline__ bool scale_queries(Queries& queries, float (&factor)[2], bool has_second, int head_dim,
                                                       const Scales& scales) {
    float4 scale[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      scale[step] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (query_column(step, 0) < head_dim) scale[step] = four_scales(scales, query_column(step, 0));
    }
    constexpr uint32_t kTop = kWhole ? 13 : 14, kBias = 127;  // exponents
    bool is_finite = true;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      factor[r] = 0.0f;
      if (r == 1 && !has_second) continue;
      float2 x[2 * kSteps];
      float top = 0.0f;
#pragma unroll
      for (int i = 0; i < 2 * kSteps; ++i) {
        const float4& its = scale[i / 2];
        x[i] = unpack2(queries[i / 2][i % 2 * 2 + r], __is_same(T, __half));
        x[i] = i % 2 == 0 ? make_float2(x[i].x * its.x, x[i].y * its.y) : make_float2(x[i].x * its.z, x[i].y * its.w);
        top = max_or_nan(top, max_or_nan(fabsf(x[i].x), fabsf(x[i].y)));
      }
      top = quad_max_or_nan(top);
      is_finite = is_finite && top < INFINITY;
      const uint32_t exponent = min(max(__float_as_uint(top) >> 23, kTop + 1), 2 * kBias);
      const float power = __uint_as_float((2 * kBias + kTop - exponent) << 23);
      factor[r] = __uint_as_float((exponent - kTop) << 23);
      if constexpr (kWhole) {
#pragma unroll
        for (int i = 0; i < kSteps; ++i) store_whole_numbers(queries, i, r, x[2 * i], x[2 * i + 1], power);
      } else {
#pragma unroll
        for (int i = 0; i < 2 * kSteps; ++i) queries[i / 2][i % 2 * 2 + r] = pack2<Operand>(x[i].x * power, x[i].y * power);
      }
    }
    return is_finite;
  }

  /// Of a row's output, kRun neighbouring columns from out_column(i) on.
  static constexpr int kRun = C::kIsQuantized ? 4 : 2;
  static __device__ __forceinline__ int out_column(int i) { return 4 * kRun * i + kRun * static_cast<int>(threadIdx.x % 4); }
  static __device__ __forceinline__ void store_run(float* row, const Out& out, int i, int r) {
    if constexpr (C::kIsQuantized) {
      const float (&even)[4] = out[0][2 * i], (&odd)[4] = out[0][2 * i + 1];
      *reinterpret_cast<float4*>(row + out_column(i)) = {even[2 * r], odd[2 * r], even[2 * r + 1], odd[2 * r + 1]};
    } else {
      *reinterpret_cast<float2*>(row + out_column(i)) = make_float2(out[0][i][2 * r], out[0][i][2 * r + 1]);
    }
  }

  /// Where the lane's part of the first ldmatrix lies, in the keys' panels and in those of the values.
  static __device__ __forceinline__ uint32_t key_lane() {
    const int lane = threadIdx.x % 32;
    return swizzled_offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  }
  static __device__ __forceinline__ uint32_t value_lane() {
    const int lane = threadIdx.x % 32;
    return swizzled_offset(lane / 8 % 2 * 8 + lane % 8, lane / 16);
  }

  /// Loads first … first + kTogether - 1 of a tile's keys. `keys`: the stage's shared address + key_lane().
  static __device__ __forceinline__ void load_keys(uint32_t (&b)[kTogether][4], uint32_t keys, const TileLayout& layout,
                                                   int first) {
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int load = (first + i) / kPairs, pair = (first + i) % kPairs;
      ldmatrix_x4(b[i], swizzled_step(keys, load % 4) + load / 4 * layout.panel + pair * layout.half);
    }
  }

  /// scores = Q K^T. `keys`: the stage's shared address + key_lane().
  static __device__ __forceinline__ void multiply_keys(Scores& scores, const Queries& queries, uint32_t keys,
                                                       const TileLayout& layout) {
#pragma unroll
    for (int i = 0; i < C::kKeyBlocks * 4; ++i) scores[0][i / 4][i % 4] = 0.0f;
#pragma unroll
    for (int first = 0; first < kLoads * kPairs; first += kTogether) {
      uint32_t b[kTogether][4];
      load_keys(b, keys, layout, first);
#pragma unroll
      for (int i = 0; i < kTogether * kStepsOfLoad; ++i) {
        const int load = (first + i / kStepsOfLoad) / kPairs, pair = (first + i / kStepsOfLoad) % kPairs;
        uint32_t x[4];
        key_operands(x, b[i / kStepsOfLoad], i % kStepsOfLoad);
        mma_m16n8k16<Operand>(scores[0][2 * pair], queries[load * kStepsOfLoad + i % kStepsOfLoad], x[0], x[1]);
        mma_m16n8k16<Operand>(scores[0][2 * pair + 1], queries[load * kStepsOfLoad + i % kStepsOfLoad], x[2], x[3]);
      }
    }
  }

  /// scores = Q K^T like multiply_keys, for queries that store_whole_numbers made.
  static __device__ __forceinline__ void multiply_whole_keys(Scores& scores, const Queries& queries, uint32_t keys,
                                                             const TileLayout& layout) {
    int high[C::kKeyBlocks][4] = {}, low[C::kKeyBlocks][4] = {};
#pragma unroll
    for (int first = 0; first < kLoads * kPairs; first += kTogether) {
      uint32_t b[kTogether][4];
      load_keys(b, keys, layout, first);
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int load = (first + i) / kPairs, pair = (first + i) % kPairs;
        mma_m16n8k32_int8(high[2 * pair], queries[2 * load], b[i][0], b[i][1]);
        mma_m16n8k32_int8(high[2 * pair + 1], queries[2 * load], b[i][2], b[i][3]);
        mma_m16n8k32_int8(low[2 * pair], queries[2 * load + 1], b[i][0], b[i][1]);
        mma_m16n8k32_int8(low[2 * pair + 1], queries[2 * load + 1], b[i][2], b[i][3]);
      }
    }
#pragma unroll
    for (int i = 0; i < C::kKeyBlocks * 4; ++i)  // the sums are below 2^30 for 256 columns
      scores[0][i / 4][i % 4] = __int2float_rn(high[i / 4][i % 4] * 256 + low[i / 4][i % 4]);
  }

  /// out += P V. `values`: the address of the stage's values + value_lane().
  static __device__ __forceinline__ void multiply_values(Out& out, const Weights& weights, uint32_t values,
                                                         const TileLayout& layout) {
    for_values(values, layout, [&](int k, int d, uint32_t (&b)[4]) { multiply(out, weights, k, d, b); });
  }

  /// The same where some rows don't see some keys. A weight of 0 keeps a value out of a sum only if that is finite: values that
  /// no row sees are taken as 0; if one that some rows see and others don't is not finite, each row is multiplied alone.
  static __device__ __forceinline__ void multiply_seen_values(Out& out, const Weights& weights, uint32_t values,
                                                              const TileLayout& layout, const SeenKeys& seen) {
    if constexpr (__is_same(typename C::Stored, int8_t)) return multiply_values(out, weights, values, layout);
    if (__any_sync(kAllLanes, seen.by_some != 0)) {
      bool found = false;
      for_values(values, layout, [&](int k, int, uint32_t (&b)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) found |= has_nonfinite(b[i] & halves(seen.by_some, k, i));
      });
      if (__builtin_expect(__any_sync(kAllLanes, found), 0)) {
        Out copy;  // NOTE: only this copy need have an address
        copy_out(copy, out);
        multiply_by_row(copy, weights, values, layout, seen.by_row[0], seen.by_row[1]);
        copy_out(out, copy);
        return;
      }
    }
    for_values(values, layout, [&](int k, int d, uint32_t (&b)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i] &= halves(seen.by_any, k, i);
      multiply(out, weights, k, d, b);
    });
  }

 private:
  /// Of four neighbours t = lane % 4 of a quad, a lane has columns 2 t and 2 t + 1 of each 8, or of bytes 4 t … 4 t + 3 of
  /// each 16.
  static __device__ __forceinline__ int query_column(int step, int i) {
    const int t = static_cast<int>(threadIdx.x % 4);
    return 16 * step + (C::kIsQuantized ? 4 * t + i / 2 * 2 : i / 2 * 8 + 2 * t);
  }

  /// Of what ldmatrix brought of 16 keys, the operands of their two blocks for step `step` of its columns.
  static __device__ __forceinline__ void key_operands(uint32_t (&x)[4], const uint32_t (&b)[4], int step) {
    if constexpr (C::kIsQuantized) {
      widen<typename C::Stored, BytePairs::kNeighbours>(b[step], x[0], x[1]);
      widen<typename C::Stored, BytePairs::kNeighbours>(b[2 + step], x[2], x[3]);
    } else {
      x[0] = b[0], x[1] = b[1], x[2] = b[2], x[3] = b[3];
    }
  }

  /// Of what a transposing ldmatrix brought, the operands of 16 columns: as they are the first 8 and the last 8, of bytes the
  /// even ones and the odd ones.
  static __device__ __forceinline__ void value_operands(uint32_t (&x)[4], const uint32_t (&b)[4], int step) {
    if constexpr (C::kIsQuantized) {
      widen<typename C::Stored, BytePairs::kAlternating>(b[2 * step], x[0], x[2]);
      widen<typename C::Stored, BytePairs::kAlternating>(b[2 * step + 1], x[1], x[3]);
    } else {
      x[0] = b[0], x[1] = b[1], x[2] = b[2], x[3] = b[3];
    }
  }

  /// Stores four neighbours of row r of the lane's two, those of step `step`, as whole numbers 256 high + low, of which each is a
  /// signed byte; `power` brings them to at most 2^14. One instruction multiplies two steps: the bytes `high` of both go to where
  /// the first one's numbers are, the bytes `low` to where the second one's are.
  static __device__ __forceinline__ void store_whole_numbers(Queries& queries, int step, int r, float2 first, float2 second,
                                                             float power) {
    constexpr float kRounds = 12582912.0f;  // 1.5 * 2^23: the last bits of a sum are the whole number, in two's complement
    const float x[4] = {first.x, first.y, second.x, second.y};
    uint32_t low[4], high[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      low[i] = __float_as_uint(fmaf(x[i], power, kRounds));
      high[i] = low[i] + 128;  // of which the second byte is used: low's is signed
    }
    const int place = step % 2 * 2 + r, at = step / 2 * 2;
    queries[at][place] = __byte_perm(__byte_perm(high[0], high[1], 0x0051), __byte_perm(high[2], high[3], 0x0051), 0x5410);
    queries[at + 1][place] = __byte_perm(__byte_perm(low[0], low[1], 0x0040), __byte_perm(low[2], low[3], 0x0040), 0x5410);
  }

  /// Calls use(k, d, x) for each 16 keys (k) and 16 columns (d, in blocks of 8): x are the operands of two instructions.
  template <class Use>
  static __device__ __forceinline__ void for_values(uint32_t values, const TileLayout& layout, Use use) {
    constexpr int kValueLoads = kLoads < 4 ? kLoads : 4;  // in flight
#pragma unroll
    for (int k = 0; k < C::kTileN / 16; ++k) {
#pragma unroll
      for (int first = 0; first < kLoads; first += kValueLoads) {
        uint32_t b[kValueLoads][4];
#pragma unroll
        for (int i = 0; i < kValueLoads; ++i)
          ldmatrix_x4_transposed(b[i], swizzled_step(values, i) + first / 4 * layout.panel + k * layout.half);
#pragma unroll
        for (int i = 0; i < kValueLoads * kStepsOfLoad; ++i) {
          uint32_t x[4];
          value_operands(x, b[i / kStepsOfLoad], i % kStepsOfLoad);
          use(k, 2 * (first * kStepsOfLoad + i), x);
        }
      }
    }
  }

  static __device__ __forceinline__ void multiply(Out& out, const Weights& weights, int k, int d, const uint32_t (&b)[4]) {
    const uint32_t a[4] = {weights[0][2 * k][0], weights[0][2 * k][1], weights[0][2 * k + 1][0], weights[0][2 * k + 1][1]};
    mma_m16n8k16<Operand>(out[0][d], a, b[0], b[1]);
    mma_m16n8k16<Operand>(out[0][d + 1], a, b[2], b[3]);
  }

  static __device__ __forceinline__ void copy_out(Out& to, const Out& from) {
#pragma unroll
    for (int i = 0; i < C::kDimBlocks * 4; ++i) to[0][i / 4][i % 4] = from[0][i / 4][i % 4];
  }

  /// One row after the other, with the values of the keys that it sees.
  static __device__ __noinline__ void multiply_by_row(Out& out, const Weights& weights, uint32_t values, TileLayout layout,
                                                      uint32_t seen_by_first, uint32_t seen_by_second) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int row = 0; row < kRowsPerWarp; ++row) {
      const int r = row / 8, owner = row % 8 * 4 + lane % 4;
      const uint32_t seen = __shfl_sync(kAllLanes, r == 0 ? seen_by_first : seen_by_second, owner);
      Out own = {};
      for_values(values, layout, [&](int k, int d, uint32_t (&b)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) b[i] &= halves(seen, k, i);
        multiply(own, weights, k, d, b);
      });
      if (lane / 4 != row % 8) continue;
#pragma unroll
      for (int d = 0; d < C::kDimBlocks; ++d) {
        out[0][d][0] += r == 0 ? own[0][d][0] : 0.0f;
        out[0][d][1] += r == 0 ? own[0][d][1] : 0.0f;
        out[0][d][2] += r == 1 ? own[0][d][2] : 0.0f;
        out[0][d][3] += r == 1 ? own[0][d][3] : 0.0f;
      }
    }
  }

  /// Is one of the two elements infinite or NaN?
  static __device__ __forceinline__ bool has_nonfinite(uint32_t pair) {
    constexpr uint32_t kExponent = __is_same(Operand, __half) ? 0x7c00 : 0x7f80;
    return (pair & kExponent) == kExponent || (pair >> 16 & kExponent) == kExponent;
  }

  /// Of operand i of the 16 keys k: all ones in each half whose key has a bit in `seen`.
  static __device__ __forceinline__ uint32_t halves(uint32_t seen, int k, int i) {
    const uint32_t bits = seen >> (4 * k + i % 2 * 2);
    return (bits & 1) * 0xffffu | (bits >> 1 & 1) * 0xffff0000u;
  }
};

}  // namespace fa::decode_sm90
