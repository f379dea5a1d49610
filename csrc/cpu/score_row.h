// SPDX-License-Identifier: Apache-2.0
// One row of scores of a tile: softcap, bias, ALiBi and masks as semantics/ defines them, then the online softmax step.
// Used by tile_kernel.cpp; compiled once for each instruction set. `c` counts keys from the tile's first.
#pragma once

#include "cpu/convert.h"
#include "cpu/tile.h"
#include "semantics/score.h"
#include "semantics/softmax.h"

namespace fa::cpu::FA_ISA {

inline constexpr int kStatePadding = 16;

/// One row's part of the mask or bias tensor.
struct TensorRow {
  const char* data;
  DType dtype;
  int64_t stride;  // elements between keys
  int64_t keys;    // those beyond are masked
};

FA_INLINE TensorRow tensor_row(const TensorView& t, int64_t b, int64_t h, int64_t i) {
  const int64_t offset = b * t.stride[0] + h * t.stride[1] + i * t.stride[2];
  return {static_cast<const char*>(t.data) + offset * size_of(t.dtype), t.dtype, t.shape[3] > 1 ? t.stride[3] : 0, t.shape[3]};
}

/// ScoreRule::capped on vectors (the scale is already in the query).
FA_INLINE void cap_row(float* s, int64_t begin, int64_t end, float softcap) {
  const float inverse = 1.0f / softcap;
  for (int64_t c = begin; c < end; c += kLanes) store(s + c, softcap * tanh(load(s + c) * inverse));
}

/// Adds the bias of keys first_key + [begin, end). `floats` holds end - begin floats.
static void add_bias(float* s, int64_t begin, int64_t end, const TensorRow& bias, int64_t first_key, float* floats) {
  const int64_t stop = end < bias.keys - first_key ? end : bias.keys - first_key;
  const int64_t n = stop - begin, first = (first_key + begin) * bias.stride;
  for (int64_t c = stop > begin ? stop : begin; c < end; ++c) s[c] = -INFINITY;
  if (n <= 0) return;
  if (bias.stride == 1) {
    to_float(bias.data + first * size_of(bias.dtype), bias.dtype, floats, n);
  } else {
    for (int64_t c = 0; c < n; ++c) floats[c] = element(bias.data, bias.dtype, first + c * bias.stride);
  }
  for (int64_t c = 0; c < n; ++c) s[begin + c] += floats[c];
}

static void apply_mask(float* s, int64_t begin, int64_t end, const TensorRow& mask, int64_t first_key) {
  const int64_t stop = end < mask.keys - first_key ? end : mask.keys - first_key;
  const char* m = stop > begin ? mask.data + first_key * mask.stride : nullptr;  // else the place may be anywhere
  if (mask.stride == 1) {
    for (int64_t c = begin; c < stop; ++c) s[c] = m[c] ? s[c] : -INFINITY;
  } else {
    for (int64_t c = begin; c < stop; ++c) s[c] = m[c * mask.stride] ? s[c] : -INFINITY;
  }
  for (int64_t c = stop > begin ? stop : begin; c < end; ++c) s[c] = -INFINITY;
}

static void add_alibi(float* s, int64_t begin, int64_t end, float slope, int64_t position, int64_t first_key) {
  for (int64_t c = begin; c < end; ++c) s[c] += alibi_bias(slope, position, first_key + c);
}

/// Turns kGroup rows of scores, [begin, end) of each a multiple of kLanes, into weights exp(s - max), and the rows' max and sum
/// into those with these keys. factors: what each row has summed up so far is multiplied by. max, sum and factors are read and
/// written by whole vectors: kStatePadding more floats must be there. A score that is NaN may be left out of max, but its weight,
/// and so the row's sum, is NaN.
template <int kGroup>
static void softmax_step(float* scores, int64_t stride, int64_t begin, int64_t end, float* max, float* sum, float* factors) {
  constexpr int kPadded = (kGroup + kLanes - 1) / kLanes * kLanes;
  float top[kPadded], reference[kPadded];
  for (int m = 0; m < kPadded; ++m) top[m] = -INFINITY;
  for (int m = 0; m < kGroup; ++m) {
    const float* s = scores + m * stride;
    Vec a = load(s + begin), b = a;  // two chains: the latency of max is longer than the load's
    int64_t c = begin + kLanes;
    for (; c + kLanes < end; c += 2 * kLanes) a = vmax(a, load(s + c)), b = vmax(b, load(s + c + kLanes));
    if (c < end) a = vmax(a, load(s + c));
    const float tile_max = horizontal_max(vmax(a, b));
    top[m] = tile_max > max[m] ? tile_max : max[m];
  }
  for (int m = 0; m < kPadded; ++m) reference[m] = softmax_reference(top[m]);
  for (int m = 0; m < kPadded; m += kLanes)
    store(factors + m, exp_nonpositive(load(max + m) - load(reference + m)));  // rescale_factor
  for (int m = 0; m < kGroup; ++m) {
    float* s = scores + m * stride;
    Vec total = {};
    for (int64_t c = begin; c < end; c += kLanes) {
      const Vec weight = exp_nonpositive(load(s + c) - reference[m]);
      store(s + c, weight);
      total += weight;
    }
    max[m] = top[m];
    sum[m] = sum[m] * factors[m] + horizontal_sum(total);
  }
}

}  // namespace fa::cpu::FA_ISA
