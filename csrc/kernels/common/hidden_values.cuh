// SPDX-License-Identifier: Apache-2.0
// Values of hidden keys never reach a result. Tensor cores multiply a value that a row must not see by a weight of 0, which keeps
// it out of the sum unless the value is infinite or NaN: then the output becomes NaN, although the row's weights are numbers.
// Where keys are hidden within a tile, kernels search their output for such rows (has_spoilt_row), and once it is written they
// call mend_row(), which computes a row anew from the keys that it sees: slow, and as rare as such values. NOTE: every instance
// of every kernel has a copy of it, so its loops are not unrolled: the compiler would spend a third of its time on them.
#pragma once

#include "fa/attention.h"
#include "kernels/common/convert.cuh"
#include "kernels/common/query_bias.cuh"
#include "kernels/common/reduce.cuh"
#include "semantics/descale.h"
#include "semantics/score.h"
#include "semantics/sequence.h"
#include "semantics/softmax.h"

namespace fa {

/// Is one of the two rows of an accumulator (rows change with every second element) NaN, though the sum of its weights is a
/// number? Half an instruction an element, so infinity may count as NaN, and so may numbers above 1e19: mend_row() looks at each.
template <int kCount>
__device__ __forceinline__ bool has_spoilt_row(const float (&out)[kCount], const float (&sum)[2]) {
  bool found = false;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float total = 0.0f;
#pragma unroll
    for (int i = 2 * r; i < kCount; i += 4) total = fmaf(out[i], out[i + 1], total);
    found |= isnan(total) && !isnan(sum[r]);
  }
  return found;
}

/// Sequence `idx`, for code that rarely runs: SequenceRule::at() is 300 instructions.
template <class Rule>
__device__ __noinline__ Sequence sequence_at(const Rule& rule, int idx) {
  return rule.at(idx);
}

/// One query row, and what it has to do with a key.
template <class T>
struct RowView {
  const AttentionParams& p;
  const Sequence& sequence;
  int sequence_idx, head;
  int64_t row;  // in the sequence

  /// Element `key` of the row in mask or bias.
  __device__ __forceinline__ int64_t offset(const TensorView& view, int64_t key) const {
    return sequence.batch_idx * view.stride[0] + head * view.stride[1] + (sequence.first_row + row) * view.stride[2] +
           (view.shape[3] > 1 ? key * view.stride[3] : 0);
  }
  __device__ __forceinline__ float bias(int64_t key) const {
    return p.bias.present ? load_float(p.bias.data, p.bias.dtype, offset(p.bias, key)) : 0.0f;
  }
  /// Apart from a score of -inf, which hides the key too.
  __device__ __forceinline__ bool may_see(int64_t key) const {
    if (!sequence.mask.visible(row, key)) return false;
    if (p.mask.present) {
      if (key >= p.mask.shape[3] || static_cast<const uint8_t*>(p.mask.data)[offset(p.mask, key)] == 0) return false;
    }
    return !p.bias.present || key < p.bias.shape[3];
  }
  __device__ __forceinline__ int64_t key_head() const {  // in 32 bits: a 64-bit division is a hundred instructions
    return head / (static_cast<int>(p.query.shape[1]) / static_cast<int>(p.key.shape[1]));
  }
  __device__ __forceinline__ T* row_of(const TensorView& view, int64_t its_head, int64_t its_row) const {
    return static_cast<T*>(view.data) + sequence.batch_idx * view.stride[0] + its_head * view.stride[1] +
           its_row * view.stride[2];
  }
  /// An element of the row `q` of queries, with its bias.
  __device__ __forceinline__ float query(const T* q, int column) const {
    return to_float(p.query_bias.present ? add_rounded(q[column], query_bias_of<T>(p, head)[column]) : q[column]);
  }
  __device__ __forceinline__ float score(int64_t key) const {
    const T* q = row_of(p.query, head, sequence.first_row + row);
    const T* k = row_of(p.key, key_head(), sequence.first_key + key);
    float dot = 0.0f;
#pragma unroll 1
    for (int column = 0; column < p.query.shape[3]; ++column) dot = fmaf(query(q, column), to_float(k[column]), dot);
    float scale = p.softmax_scale;
    if constexpr (__is_same(T, Float8)) scale = descaled_softmax_scale(p, sequence_idx, head, key_head());
    float score = ScoreRule{scale, p.softcap}.capped(dot) + bias(key);
    if (p.alibi_slopes.present) {
      const int64_t idx = sequence_idx * p.alibi_slopes.stride[0] + head * p.alibi_slopes.stride[1];
      score += alibi_bias(static_cast<const float*>(p.alibi_slopes.data)[idx], row + sequence.mask.query_offset, key);
    }
    return score;
  }
};

/// Columns that a lane mends at a time.
inline constexpr int kColumnsOfLane = 4;

/// Softmax over the keys that the row sees. columns: of the sum of values, weighted by exp(score - max), the columns first_column
/// + lane + 32 i below end_column. For a whole warp.
template <class T>
__device__ __forceinline__ SoftmaxState attend_seen(const RowView<T>& row, int first_column, int end_column,
                                                    float (&columns)[kColumnsOfLane]) {
  const int lane = threadIdx.x % 32;
  const KeyRange keys = row.sequence.mask.key_range(row.row, row.row);
  SoftmaxState state{-INFINITY, 0.0f};  // its sum is this lane's share
#pragma unroll
  for (float& x : columns) x = 0.0f;
#pragma unroll 1
  for (int64_t first = keys.begin; first < keys.end; first += 32) {
    // 1. Each lane has one key.
    const bool may_see = first + lane < keys.end && row.may_see(first + lane);
    const float score = may_see ? row.score(first + lane) : -INFINITY;
    unsigned seen = __ballot_sync(kAllLanes, score != -INFINITY);
    if (seen == 0) continue;
    float max = fmaxf(state.max, score);
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, lanes));
    // 2. What there is comes to the new maximum, and the keys' weights and values are added.
    const float factor = rescale_factor(state.max, max), weight = expf(score - softmax_reference(max));
    state = {max, state.sum * factor + weight};
#pragma unroll
    for (float& x : columns) x *= factor;
#pragma unroll 1
    for (; seen != 0; seen &= seen - 1) {
      const int i = __ffs(seen) - 1;
      const float its_weight = __shfl_sync(kAllLanes, weight, i);
      const T* value = row.row_of(row.p.value, row.key_head(), row.sequence.first_key + first + i);
#pragma unroll
      for (int j = 0; j < kColumnsOfLane; ++j) {
        const int column = first_column + lane + 32 * j;
        if (column < end_column) columns[j] = fmaf(its_weight, to_float(value[column]), columns[j]);
      }
    }
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) state.sum += __shfl_xor_sync(kAllLanes, state.sum, lanes);
  return state;
}

/// One row of the output, whose type is that of the operands, or with float8 operands any.
template <class T>
struct OutputRow {
  T* row;

  __device__ OutputRow(const RowView<T>& view, const TensorView& out)
      : row(view.row_of(out, view.head, view.sequence.first_row + view.row)) {}
  __device__ __forceinline__ bool is_nan(int column) const { return isnan(to_float(row[column])); }
  __device__ __forceinline__ void store(int column, float x) const { row[column] = from_float<T>(x); }
  __device__ __forceinline__ float factor(const RowView<T>&) const { return 1.0f; }
};

template <>
struct OutputRow<Float8> {
  const TensorView& out;
  int64_t first;

  __device__ OutputRow(const RowView<Float8>& view, const TensorView& out)
      : out(out),
        first(view.sequence.batch_idx * out.stride[0] + view.head * out.stride[1] +
              (view.sequence.first_row + view.row) * out.stride[2]) {}
  __device__ __forceinline__ bool is_nan(int column) const {
    const bool is_float8 = out.dtype == DType::kFloat8E4M3;
    return isnan(is_float8 ? to_float(static_cast<const Float8*>(out.data)[first + column])
                           : load_float(out.data, out.dtype, first + column));
  }
  __device__ __forceinline__ void store(int column, float x) const {
    if (out.dtype == DType::kFloat32) static_cast<float*>(out.data)[first + column] = x;
    if (out.dtype == DType::kFloat16) static_cast<__half*>(out.data)[first + column] = from_float<__half>(x);
    if (out.dtype == DType::kBFloat16) static_cast<__nv_bfloat16*>(out.data)[first + column] = from_float<__nv_bfloat16>(x);
    if (out.dtype == DType::kFloat8E4M3) static_cast<Float8*>(out.data)[first + column] = from_float<Float8>(x);
  }
  __device__ __forceinline__ float factor(const RowView<Float8>& view) const {
    return output_factor(view.p, view.sequence_idx, view.head, view.key_head());
  }
};

/// Computes those of the columns first_column … end_column - 1 of a row's output anew that are NaN, 128 at a time. For a whole
/// warp.
template <class T>
__device__ __noinline__ void mend_row(const AttentionParams& p, const SequenceRule& sequences, int sequence_idx, int head,
                                      int row, int first_column, int end_column) {
  const Sequence sequence = sequence_at(sequences, sequence_idx);
  if (row < 0 || row >= sequence.query_length) return;
  const RowView<T> view{p, sequence, sequence_idx, head, row};
  const OutputRow<T> out(view, p.out);
  const float sink = p.sinks.present ? static_cast<const float*>(p.sinks.data)[head * p.sinks.stride[0]] : -INFINITY;
#pragma unroll 1
  for (; first_column < end_column; first_column += 32 * kColumnsOfLane) {
    bool is_nan[kColumnsOfLane], any = false;
#pragma unroll
    for (int j = 0; j < kColumnsOfLane; ++j) {
      const int column = first_column + threadIdx.x % 32 + 32 * j;
      is_nan[j] = column < end_column && out.is_nan(column);
      any |= is_nan[j];
    }
    if (!__any_sync(kAllLanes, any)) continue;
    float columns[kColumnsOfLane];
    const SoftmaxState keys = attend_seen(view, first_column, end_column, columns);
    const SoftmaxState all = add_sink(keys, sink);
    const float factor = rescale_factor(keys.max, all.max) * normalizer(all) * out.factor(view);
#pragma unroll
    for (int j = 0; j < kColumnsOfLane; ++j) {
      if (is_nan[j]) out.store(first_column + threadIdx.x % 32 + 32 * j, columns[j] * factor);
    }
  }
}

/// … of all its columns.
template <class T>
__device__ __forceinline__ void mend_row(const AttentionParams& p, const SequenceRule& sequences, int sequence_idx, int head,
                                         int row) {
  mend_row<T>(p, sequences, sequence_idx, head, row, 0, static_cast<int>(p.value.shape[3]));
}

}  // namespace fa
