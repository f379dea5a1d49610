// SPDX-License-Identifier: Apache-2.0
// FlashAttention-2's backward pass on one CPU thread. For each tile of query rows and each tile of keys that they see: the
// weights P = exp(S - lse) anew, dS = P (dO V^T - D) with D = rowsum(dO O) - d_lse, and from them shares of dQ = dS K, dK = dS^T
// Q and dV = P^T dO. All of it in float32; nothing is as large as the matrix of scores. Compiled once for each instruction set
// (cpu.cmake); called through the BackwardIsa table by backward_cpu.cpp.
#include <cmath>

#include "cpu/backward_cpu.h"
#include "cpu/block.h"
#include "cpu/pack.h"
#include "cpu/score_row.h"

namespace fa::cpu {
namespace FA_ISA {
namespace {

constexpr int64_t kTileKeys = 192;           // a multiple of kRows and of every kPanel
constexpr int64_t kStride = kTileKeys + 16;  // of rows of scores; not a power of two
static_assert(kBackwardRows % kRows == 0 && kTileKeys % kRows == 0 && kTileKeys % kPanel == 0, "tiles are whole blocks");

/// What one thread needs for one task; floats, carved from one allocation. Rows of D and D_v columns are padded to whole vectors.
struct Scratch {
  float *query, *query_groups;  // scaled; row by row, and in groups of kRows rows, each [D][kRows]
  float *d_out, *d_out_groups;
  float *key, *key_panels;  // row by row, and pack_transposed
  float *value, *value_panels;
  float *weights, *d_scores, *capped;  // [kBackwardRows][kStride]
  float* d_query;                      // of the tile's rows
  float *d_key, *d_value;              // of all keys in use
  float *reference, *factor, *delta;   // of the tile's rows: a weight is exp(score - reference) * factor
  float* staging;
  float* end;

  Scratch(const BackwardCall& call, float* memory) : end(memory) {
    const int64_t d = round_up(call.params.query.shape[3], kLanes), d_v = round_up(call.params.out.shape[3], kLanes);
    const int64_t keys = round_up(call.longest_keys, kTileKeys);
    query = take(kBackwardRows * d), query_groups = take(kBackwardRows * d);
    d_out = take(kBackwardRows * d_v), d_out_groups = take(kBackwardRows * d_v);
    key = take(kTileKeys * d), key_panels = take(kTileKeys * d);
    value = take(kTileKeys * d_v), value_panels = take(kTileKeys * d_v);
    weights = take(kBackwardRows * kStride), d_scores = take(kBackwardRows * kStride), capped = take(kBackwardRows * kStride);
    d_query = take(kBackwardRows * d);
    d_key = take(keys * d), d_value = take(keys * d_v);
    reference = take(kBackwardRows), factor = take(kBackwardRows), delta = take(kBackwardRows);
    const int64_t most = d > d_v ? d : d_v;
    staging = take(kLanes * most > kTileKeys ? kLanes * most : kTileKeys);
  }

 private:
  float* take(int64_t count) {
    float* const begin = end;
    end += round_up(count, 16);
    return begin;
  }
};

/// Where row i of a tensor's head begins.
FA_INLINE char* row_at(const TensorView& t, int64_t b, int64_t h, int64_t i) {
  return static_cast<char*>(t.data) + (b * t.stride[0] + h * t.stride[1] + i * t.stride[2]) * size_of(t.dtype);
}

FA_INLINE float* float_at(const TensorView& t, int64_t b, int64_t h, int64_t i) {
  return reinterpret_cast<float*>(row_at(t, b, h, i));
}

FA_INLINE void clear(float* target, int64_t n) {
  for (int64_t x = 0; x < n; ++x) target[x] = 0;
}

/// Is none of the numbers infinite or NaN? n is a multiple of kLanes.
FA_INLINE bool all_finite(const float* numbers, int64_t n) {
  Vec sum = {};
  for (int64_t x = 0; x < n; x += kLanes) sum += load(numbers + x) * 0.0f;
  return horizontal_sum(sum) == 0.0f;
}

/// The rows of a tile of one query head, and what they see of a tile of keys.
class BackwardTile {
 public:
  BackwardTile(const BackwardCall& call, int64_t sequence_idx, void* memory)
      : p_(call.params),
        g_(call.gradients),
        s_(call, static_cast<float*>(memory)),
        sequence_idx_(sequence_idx),
        sequence_(call.sequences.at(sequence_idx)),
        d_(p_.query.shape[3]),
        d_v_(p_.out.shape[3]),
        d_padded_(round_up(d_, kLanes)),
        d_v_padded_(round_up(d_v_, kLanes)) {}

  const Scratch& scratch() const { return s_; }
  const Sequence& sequence() const { return sequence_; }
  KeyRange seen_keys() const { return sequence_.mask.key_range(first_row_, first_row_ + num_rows_ - 1); }

  /// Rows first … first + n - 1 of a head: queries, gradients of the output, and what the softmax's backward pass needs of them.
  void load_rows(int64_t head, int64_t first, int64_t n) {
    head_ = head, first_row_ = first, num_rows_ = n, padded_rows_ = round_up(n, kRows);
    for (int64_t r = 0; r < padded_rows_; ++r) {
      float *query = s_.query + r * d_padded_, *d_out = s_.d_out + r * d_v_padded_;
      clear(query, d_padded_), clear(d_out, d_v_padded_);
      s_.reference[r] = INFINITY, s_.factor[r] = 1, s_.delta[r] = 0;  // rows that are not there have weights of 0
      if (r < n) load_row(r, query, d_out);
    }
    group(s_.query, d_, d_padded_, s_.query_groups);
    group(s_.d_out, d_v_, d_v_padded_, s_.d_out_groups);
    rows_are_finite_ = all_finite(s_.query, padded_rows_ * d_padded_) && all_finite(s_.d_out, padded_rows_ * d_v_padded_);
  }

  /// Keys and values first … first + n - 1 of a key head.
  void load_keys(int64_t kv_head, int64_t first, int64_t n) {
    first_key_ = first, num_keys_ = n;
    load_tile(p_.key, kv_head, d_, d_padded_, s_.key, s_.key_panels);
    load_tile(p_.value, kv_head, d_v_, d_v_padded_, s_.value, s_.value_panels);
    keys_are_finite_ = all_finite(s_.key, n * d_padded_) && all_finite(s_.value, n * d_v_padded_);
  }

  /// Scores of the rows' tile and the keys' tile, by all rules; -inf where a row doesn't see a key, and beyond both.
  void score() {
    for (int64_t r = 0; r < padded_rows_; r += kRows)
      multiply_keys(s_.query_groups + r * d_, s_.key_panels, d_, s_.weights + r * kStride);
    for (int64_t r = 0; r < padded_rows_; ++r) apply_rules(r, s_.weights + r * kStride, padded_keys());
  }

  /// Is a log-sum-exp so large that its rounding counts? A mask that adds the least finite number makes it so.
  bool has_coarse_lse() const {
    constexpr float kFine = 32.0f;  // below, the rounding changes weights by less than 2e-6 of themselves
    bool found = false;
    for (int64_t r = 0; r < num_rows_; ++r) found |= std::fabs(s_.reference[r]) > kFine && s_.reference[r] != INFINITY;
    return found;
  }

  void begin_sums() {
    for (int64_t r = 0; r < num_rows_; ++r) states_[r] = {-INFINITY, 0.0f}, products_[r] = 0;
  }

  /// After score(): the tile's keys join the softmax of each row, and its mean of dO V^T.
  void add_to_sums() {
    multiply_values();
    for (int64_t r = 0; r < num_rows_; ++r) {
      const float *scores = s_.weights + r * kStride, *d_weights = s_.d_scores + r * kStride;
      SoftmaxState tile{-INFINITY, 0.0f};
      for (int64_t c = 0; c < num_keys_; ++c) tile.max = scores[c] > tile.max ? scores[c] : tile.max;
      const float reference = softmax_reference(tile.max);
      Vec sum = {}, product = {};
      for (int64_t c = 0; c < padded_keys(); c += kLanes) {
        const Vec weight = exp_nonpositive(load(scores + c) - reference);
        sum += weight;
        product += select(weight == 0.0f, Vec{}, weight * load(d_weights + c));
      }
      tile.sum = horizontal_sum(sum);
      const SoftmaxState merged = merge(states_[r], tile);
      products_[r] = products_[r] * rescale_factor(states_[r].max, merged.max) +
                     horizontal_sum(product) * rescale_factor(tile.max, merged.max);
      states_[r] = merged;
    }
  }

  /// After all tiles: weights by the row's own maximum and sum. What the given log-sum-exp has besides, because it is of more
  /// keys than are here, stays a factor. Where it has nothing, D may be that of the products, without the rounding of a 16-bit
  /// output.
  void use_sums() {
    constexpr float kAlone = 1.0f - 0x1p-12f;
    for (int64_t r = 0; r < num_rows_; ++r) {
      if (s_.reference[r] == INFINITY) continue;
      const SoftmaxState state = p_.sinks.present ? add_sink(states_[r], sink()) : states_[r];
      const float share = expf(lse(state) - s_.reference[r]);
      s_.factor[r] = share * normalizer(state);
      s_.reference[r] = softmax_reference(state.max);
      if (p_.out.dtype != DType::kFloat32 && share > kAlone)
        s_.delta[r] = products_[r] * rescale_factor(states_[r].max, state.max) * s_.factor[r] - d_lse_of(r);
    }
  }

  /// After score(): scores become weights, and d_scores their gradients (before the softcap's, where they are those of a bias).
  void differentiate(bool of_bias) {
    multiply_values();
    for (int64_t r = 0; r < padded_rows_; ++r) {
      float *weights = s_.weights + r * kStride, *d_scores = s_.d_scores + r * kStride;
      const int64_t padded = padded_keys();
      differentiate_row(r, weights, d_scores, padded, of_bias);
      clear(weights + padded, kStride - padded), clear(d_scores + padded, kStride - padded);
    }
  }

  /// The tile's shares of dQ, dK and dV, the last two at the place of the tile's first key.
  void add_gradients() {
    float *d_key = s_.d_key + first_key_ * d_padded_, *d_value = s_.d_value + first_key_ * d_v_padded_;
    if (!rows_are_finite_ || !keys_are_finite_) return add_pairs(d_key, d_value);
    for (int64_t r = 0; r < padded_rows_; r += kRows)
      add_product<kStride, 1>(s_.d_scores + r * kStride, s_.key, num_keys_, s_.d_query + r * d_padded_, d_padded_);
    for (int64_t j = 0; j < num_keys_; j += kRows) {
      add_product<1, kStride>(s_.d_scores + j, s_.query, num_rows_, d_key + j * d_padded_, d_padded_);
      add_product<1, kStride>(s_.weights + j, s_.d_out, num_rows_, d_value + j * d_v_padded_, d_v_padded_);
    }
  }

  /// The tile's share of d_bias, whose axes of stride 0 take the sums. Where that of keys is one of them, each row's goes to sums
  /// (of double: so many numbers may cancel), or all rows' to the first.
  void add_bias_gradient(double* sums) {
    const TensorView& d = g_.d_bias;
    const int64_t stride = d.shape[3] > 1 ? d.stride[3] : 0;
    const bool one_row = d.shape[2] > 1 && d.stride[2] == 0;
    const int64_t n = num_keys_ < d.shape[3] - first_key_ ? num_keys_ : d.shape[3] - first_key_;
    for (int64_t r = 0; r < num_rows_; ++r) {
      const float* source = s_.d_scores + r * kStride;
      if (stride == 0) {
        for (int64_t j = 0; j < n; ++j) sums[one_row ? 0 : r] += source[j];
      } else {
        float* target = float_at(d, sequence_.batch_idx, head_, first_row_ + r) + first_key_ * stride;
        for (int64_t j = 0; j < n; ++j) target[j * stride] += source[j];
      }
    }
  }

  void write_query_gradient() {
    for (int64_t r = 0; r < num_rows_; ++r) {
      void* const target = row_at(g_.d_query, sequence_.batch_idx, head_, sequence_.first_row + first_row_ + r);
      from_float(s_.d_query + r * d_padded_, p_.softmax_scale, target, g_.d_query.dtype, d_);
    }
  }

  void write_key_gradients(int64_t kv_head) {
    for (int64_t j = 0; j < sequence_.mask.kv_length; ++j) {
      void* const key = row_at(g_.d_key, sequence_.batch_idx, kv_head, sequence_.first_key + j);
      void* const value = row_at(g_.d_value, sequence_.batch_idx, kv_head, sequence_.first_key + j);
      from_float(s_.d_key + j * d_padded_, 1.0f, key, g_.d_key.dtype, d_);
      from_float(s_.d_value + j * d_v_padded_, 1.0f, value, g_.d_value.dtype, d_v_);
    }
  }

  /// Of the rows' tile: the sink's weight in each row times -D.
  float sink_gradient() const {
    float sum = 0;
    for (int64_t r = 0; r < num_rows_ && sink() != -INFINITY; ++r)
      sum -= expf(sink() - s_.reference[r]) * s_.factor[r] * s_.delta[r];
    return sum;
  }

 private:
  int64_t padded_keys() const { return round_up(num_keys_, kLanes); }

  float sink() const { return static_cast<const float*>(p_.sinks.data)[p_.sinks.shape[0] > 1 ? head_ * p_.sinks.stride[0] : 0]; }

  void load_row(int64_t r, float* query, float* d_out) {
    const int64_t b = sequence_.batch_idx, row = sequence_.first_row + first_row_ + r;
    to_float(row_at(p_.query, b, head_, row), p_.query.dtype, query, d_);
    for (int64_t x = 0; x < d_; ++x) query[x] *= p_.softmax_scale;
    to_float(row_at(g_.d_out, b, head_, row), g_.d_out.dtype, d_out, d_v_);
    to_float(row_at(p_.out, b, head_, row), p_.out.dtype, s_.staging, d_v_);
    float sum = 0;
    for (int64_t x = 0; x < d_v_; ++x) sum += d_out[x] * s_.staging[x];
    s_.delta[r] = sum - d_lse_of(r);
    const float lse = *float_at(p_.lse, b, head_, row);
    s_.reference[r] = lse == -INFINITY ? INFINITY : lse;  // a row without keys has weights of 0
  }

  float d_lse_of(int64_t r) const {
    return g_.d_lse.present ? *float_at(g_.d_lse, sequence_.batch_idx, head_, sequence_.first_row + first_row_ + r) : 0.0f;
  }

  /// Rows into groups of kRows, as multiply_panel reads its left operand.
  void group(const float* rows, int64_t columns, int64_t stride, float* groups) const {
    for (int64_t r = 0; r < padded_rows_; ++r) {
      float* target = groups + r / kRows * kRows * columns + r % kRows;
      for (int64_t x = 0; x < columns; ++x) target[x * kRows] = rows[r * stride + x];
    }
  }

  void load_tile(const TensorView& t, int64_t head, int64_t columns, int64_t stride, float* rows, float* panels) {
    const int64_t first = sequence_.first_key + first_key_;
    for (int64_t j = 0; j < num_keys_; ++j) {
      to_float(row_at(t, sequence_.batch_idx, head, first + j), t.dtype, rows + j * stride, columns);
      clear(rows + j * stride + columns, stride - columns);
    }
    const Rows source{reinterpret_cast<const char*>(rows), DType::kFloat32, stride * int64_t{sizeof(float)}, columns};
    pack_transposed(source, 0, num_keys_, panels, s_.staging);
  }

  /// d_scores = dO V^T, of the rows' tile and the keys' tile.
  void multiply_values() {
    for (int64_t r = 0; r < padded_rows_; r += kRows)
      multiply_keys(s_.d_out_groups + r * d_v_, s_.value_panels, d_v_, s_.d_scores + r * kStride);
  }

  /// kRows rows, grouped, times all keys (or values) of the tile.
  void multiply_keys(const float* rows, const float* panels, int64_t columns, float* target) const {
    const int64_t padded = padded_keys();
    for (int64_t c = 0; c < padded; c += kPanel) {
      const int64_t width = panel_width(c, padded);
      multiply_panel<kRows, 1, kRows>(width, rows, panels + c * columns, width, columns, target + c, kStride, nullptr);
    }
  }

  /// target[kRows][columns] += weights times right[count][columns].
  template <int kRowStep, int kSumStep>
  static void add_product(const float* weights, const float* right, int64_t count, float* target, int64_t columns) {
    float ones[kRows];
    for (float& one : ones) one = 1;
    for (int64_t c = 0; c < columns; c += kPanel) {
      const int64_t width = panel_width(c, columns);
      multiply_panel<kRows, kRowStep, kSumStep>(width, weights, right + c, columns, count, target + c, columns, ones);
    }
  }

  /// add_gradients where a number is NaN or infinite: a pair of a row and a key that it doesn't see has no part in any sum, and 0
  /// times such a number would be NaN.
  void add_pairs(float* d_key, float* d_value) {
    for (int64_t r = 0; r < num_rows_; ++r) {
      const float *query = s_.query + r * d_padded_, *d_out = s_.d_out + r * d_v_padded_;
      for (int64_t j = 0; j < num_keys_; ++j) {
        const float weight = s_.weights[r * kStride + j], d_score = s_.d_scores[r * kStride + j];
        if (weight == 0) continue;
        const float* key = s_.key + j * d_padded_;
        for (int64_t x = 0; x < d_; ++x) s_.d_query[r * d_padded_ + x] += d_score * key[x];
        for (int64_t x = 0; x < d_; ++x) d_key[j * d_padded_ + x] += d_score * query[x];
        for (int64_t x = 0; x < d_v_; ++x) d_value[j * d_v_padded_ + x] += weight * d_out[x];
      }
    }
  }

  /// Softcap, bias, ALiBi and masks, in the operator's order; -inf for keys that the row doesn't see.
  void apply_rules(int64_t r, float* scores, int64_t padded) {
    const int64_t i = first_row_ + r, b = sequence_.batch_idx;
    const bool exists = r < num_rows_;
    if (p_.softcap != 0) {
      cap_row(scores, 0, padded, p_.softcap);
      for (int64_t c = 0; c < padded; ++c) s_.capped[r * kStride + c] = scores[c];
    }
    if (p_.bias.present && exists) add_bias(scores, 0, padded, tensor_row(p_.bias, b, head_, i), first_key_, s_.staging);
    if (p_.alibi_slopes.present) {
      const int64_t at = sequence_idx_ * p_.alibi_slopes.stride[0] + head_ * p_.alibi_slopes.stride[1];
      const float slope = static_cast<const float*>(p_.alibi_slopes.data)[at];
      add_alibi(scores, 0, padded, slope, i + sequence_.mask.query_offset, first_key_);
    }
    if (p_.mask.present && exists) apply_mask(scores, 0, padded, tensor_row(p_.mask, b, head_, i), first_key_);
    const KeyRange seen = sequence_.mask.key_range(i, i);
    const int64_t from = exists ? seen.begin - first_key_ : padded, to = seen.end - first_key_;
    for (int64_t c = 0; c < padded && c < from; ++c) scores[c] = -INFINITY;
    for (int64_t c = to > 0 ? (to < num_keys_ ? to : num_keys_) : 0; c < padded; ++c) scores[c] = -INFINITY;
  }

  /// d_scores holds dO V^T.
  void differentiate_row(int64_t r, float* weights, float* d_scores, int64_t padded, bool of_bias) const {
    const float reference = s_.reference[r], factor = s_.factor[r], delta = s_.delta[r];
    const float inverse = p_.softcap != 0 && !of_bias ? 1.0f / p_.softcap : 0.0f;
    for (int64_t c = 0; c < padded; c += kLanes) {
      const Vec score = load(weights + c);
      const Vec weight = select(score == -INFINITY, Vec{}, exp_nonpositive(score - reference) * factor);
      Vec gradient = select(weight == 0.0f, Vec{}, weight * (load(d_scores + c) - delta));
      if (inverse != 0) {
        const Vec tanh = load(s_.capped + r * kStride + c) * inverse;
        gradient *= 1.0f - tanh * tanh;
      }
      store(weights + c, weight);
      store(d_scores + c, gradient);
    }
  }

  const StepParams& p_;
  const Gradients& g_;
  const Scratch s_;
  const int64_t sequence_idx_;
  const Sequence sequence_;
  const int64_t d_, d_v_, d_padded_, d_v_padded_;
  int64_t head_ = 0, first_row_ = 0, num_rows_ = 0, padded_rows_ = 0, first_key_ = 0, num_keys_ = 0;
  bool rows_are_finite_ = true, keys_are_finite_ = true;
  SoftmaxState states_[kBackwardRows];
  float products_[kBackwardRows];
};

/// Calls work() with the scores of each tile of keys that the loaded rows see.
template <class Work>
FA_INLINE void for_key_tiles(BackwardTile& tile, int64_t kv_head, const Work& work) {
  const KeyRange range = tile.seen_keys();
  for (int64_t first = range.begin / kTileKeys * kTileKeys; first < range.end; first += kTileKeys) {
    tile.load_keys(kv_head, first, range.end - first < kTileKeys ? range.end - first : kTileKeys);
    tile.score();
    work();
  }
}

/// Loads rows of a query head. Their weights and D are summed up anew where the log-sum-exp is too coarse, or where asked.
FA_INLINE void load_rows(BackwardTile& tile, int64_t kv_head, int64_t head, int64_t first, int64_t end, bool anew) {
  tile.load_rows(head, first, end - first < kBackwardRows ? end - first : kBackwardRows);
  if (!anew && !tile.has_coarse_lse()) return;
  tile.begin_sums();
  for_key_tiles(tile, kv_head, [&] { tile.add_to_sums(); });
  tile.use_sums();
}

size_t scratch_bytes(const BackwardCall& call) {
  const Scratch scratch(call, nullptr);
  return reinterpret_cast<size_t>(scratch.end);
}

void head_gradients(const BackwardCall& call, const HeadTask& task, void* memory) {
  BackwardTile tile(call, task.sequence_idx, memory);
  const Scratch& s = tile.scratch();
  const int64_t heads = call.params.query.shape[1], group = heads / call.params.key.shape[1];
  const int64_t rows = tile.sequence().query_length;
  clear(s.d_key, s.reference - s.d_key);  // and d_value, which follows
  for (int64_t head = task.kv_head * group; head < (task.kv_head + 1) * group; ++head) {
    float sink_sum = 0;
    for (int64_t first = 0; first < rows; first += kBackwardRows) {
      load_rows(tile, task.kv_head, head, first, rows, call.sink_sums != nullptr && call.params.out.dtype != DType::kFloat32);
      clear(s.d_query, s.d_key - s.d_query);
      for_key_tiles(tile, task.kv_head, [&] { tile.differentiate(false), tile.add_gradients(); });
      tile.write_query_gradient();
      if (call.sink_sums != nullptr) sink_sum += tile.sink_gradient();
    }
    if (call.sink_sums != nullptr) call.sink_sums[task.sequence_idx * heads + head] = sink_sum;
  }
  tile.write_key_gradients(task.kv_head);
}

/// The task's elements of d_bias, `rows` from its first: 0, or where the axis of keys is broadcast, the sums.
void write_bias(const TensorView& d, const BiasTask& task, int64_t rows, const double* sums) {
  const int64_t stride = d.shape[3] > 1 ? d.stride[3] : 0, distinct = d.shape[2] > 1 && d.stride[2] == 0 ? 1 : rows;
  for (int64_t r = 0; r < distinct; ++r) {
    float* target = float_at(d, task.batch_idx, task.head, task.first_row + r);
    for (int64_t j = 0; j < d.shape[3] && stride != 0; ++j) target[j * stride] = 0;
    if (stride == 0 && d.shape[3] > 0) target[0] = static_cast<float>(sums[r]);
  }
}

void bias_gradient(const BackwardCall& call, const BiasTask& task, void* memory) {
  const TensorView& d = call.gradients.d_bias;
  const auto is_shared = [&](int axis) { return d.shape[axis] > 1 && d.stride[axis] == 0; };
  const int64_t group = call.params.query.shape[1] / call.params.key.shape[1];
  const int64_t end_row =
      is_shared(2) || d.shape[2] - task.first_row < kBackwardRows ? d.shape[2] : task.first_row + kBackwardRows;
  double sums[kBackwardRows] = {};
  write_bias(d, task, end_row - task.first_row, sums);
  // NOTE: the gradients of a row's scores sum up to almost 0, so where they are summed, D must not have a 16-bit output's
  // rounding.
  for (int64_t b = task.batch_idx; b < (is_shared(0) ? d.shape[0] : task.batch_idx + 1); ++b) {
    BackwardTile tile(call, b, memory);
    const int64_t end = end_row < tile.sequence().query_length ? end_row : tile.sequence().query_length;
    for (int64_t head = task.head; head < (is_shared(1) ? d.shape[1] : task.head + 1); ++head) {
      for (int64_t first = task.first_row; first < end; first += kBackwardRows) {
        load_rows(tile, head / group, head, first, end, call.params.out.dtype != DType::kFloat32);
        for_key_tiles(tile, head / group, [&] { tile.differentiate(true), tile.add_bias_gradient(sums); });
      }
    }
  }
  if (is_shared(3) || d.shape[3] == 1) write_bias(d, task, end_row - task.first_row, sums);
}

}  // namespace

extern const BackwardIsa kBackwardIsa;
const BackwardIsa kBackwardIsa = {scratch_bytes, head_gradients, bias_gradient};

}  // namespace FA_ISA
}  // namespace fa::cpu
