// SPDX-License-Identifier: Apache-2.0
// FlashAttention-2's forward loop on one CPU thread: for each tile of keys, packed once, every group of rows computes its scores
// Q K^T, takes an online softmax step and adds P V to its output. All of it in float32; nothing is as long as the sequence.
// Compiled once for each instruction set (cpu.cmake); called through the Isa table by attention_cpu.cpp.
#include <cmath>

#include "cpu/block.h"
#include "cpu/pack.h"
#include "cpu/row_transform.h"
#include "cpu/score_row.h"
#include "cpu/store_rows.h"
#include "cpu/tile.h"
#include "semantics/descale.h"

namespace fa::cpu {
namespace FA_ISA {
namespace {

constexpr int64_t kScoresStride = kMaxKeysPerTile + 16;  // not a power of two: the rows of a group fall into different cache sets
constexpr int kSmallGroup = 2;                           // rows of a group where fewer than kRows are left
constexpr int64_t kRowsToPackValues = 24;                // with fewer, values are cheaper to read where they are
constexpr int64_t kFewRows = 4;                          // up to here so are the keys

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

/// What one thread needs for one task; floats, carved from one allocation.
struct Scratch {
  float* query;    // groups of rows, each [D][rows of the group], scaled
  float* out;      // [rows][round_up(D_v)]
  float* keys;     // pack_transposed
  float* values;   // pack_rows
  float* scores;   // [kRows][kScoresStride]
  float* staging;  // [kLanes][round_up(max(D, D_v))], or one tile of keys
  float* max;      // [rows + kStatePadding], the state of each row (semantics/softmax.h)
  float* sum;      // likewise
  float* mean;     // [round_up(D_v)]
  float* angles;   // of RowTransform
  float* end;

  Scratch(const Tiling& tiling, float* memory) {
    const int64_t d = round_up(tiling.params.query.shape[3], kLanes), d_v = round_up(tiling.params.out.shape[3], kLanes);
    const int64_t rows = tiling.rows_per_task, tile = tiling.keys_per_tile;
    const int64_t staged = kLanes * (d > d_v ? d : d_v);
    query = memory;
    out = query + round_up(rows * d, 16);
    keys = out + round_up(rows * d_v, 16);
    values = keys + round_up(tile * d, 16);
    scores = values + round_up(tile * d_v, 16);
    staging = scores + kRows * kScoresStride;
    max = staging + round_up(staged > tile ? staged : tile, 16);
    sum = max + round_up(rows, 16) + kStatePadding;
    mean = sum + round_up(rows, 16) + kStatePadding;
    angles = mean + round_up(d_v, 16);
    end = angles + round_up(RowTransform::transform_floats(d), 16);
  }
};

/// One task on its way through the keys.
class TileKernel {
 public:
  TileKernel(const Tiling& tiling, const Task& task, void* memory)
      : p_(tiling.params),
        task_(task),
        s_(tiling, static_cast<float*>(memory)),
        step_(tiling.steps.at(task.sequence_idx)),
        sequence_(step_.sequence),
        rows_(task.num_heads * task.num_rows),
        tile_(tiling.keys_per_tile),
        d_(p_.query.shape[3]),
        d_v_(p_.out.shape[3]),
        d_v_padded_(round_up(d_v_, kLanes)),
        key_(cache_rows(p_, 0, task.sequence_idx, sequence_.batch_idx, task.kv_head, sequence_.first_key)),
        value_(cache_rows(p_, 1, task.sequence_idx, sequence_.batch_idx, task.kv_head, sequence_.first_key)),
        transform_(p_, step_, p_.norm.query_weight, p_.norm.query_epsilon, s_.angles),
        few_rows_(sequence_.query_length * task.num_heads <= kFewRows),
        plain_(p_.softcap == 0 && !p_.bias.present && !p_.alibi_slopes.present && !p_.mask.present) {}

  /// The loop over tiles of keys; its result stays in s_.out, s_.max and s_.sum.
  void attend() {
    pack_query();
    for (int64_t r = 0; r < rows_ + kStatePadding; ++r) s_.max[r] = -INFINITY, s_.sum[r] = 0;
    for (int64_t x = 0; x < rows_ * d_v_padded_; ++x) s_.out[x] = 0;
    KeyRange range = sequence_.mask.key_range(task_.first_row, task_.first_row + task_.num_rows - 1);
    if (range.begin < task_.key_begin) range.begin = task_.key_begin;
    if (range.end > task_.key_end) range.end = task_.key_end;
    // NOTE: tiles begin at multiples of their length, so that a row's result doesn't depend on the rows it shares a task with.
    for (int64_t first = range.begin / tile_ * tile_; first < range.end; first += tile_) {
      const int64_t n = range.end - first < tile_ ? range.end - first : tile_;
      attend_tile(first, n);
    }
  }

  void write_partials() {
    for (int64_t r = 0; r < rows_; ++r) {
      float* partial = task_.partials + r * (2 + d_v_);
      partial[0] = s_.max[r];
      partial[1] = s_.sum[r];
      for (int64_t x = 0; x < d_v_; ++x) partial[2 + x] = s_.out[r * d_v_padded_ + x];
    }
  }

  /// Sums up the partials of all splits, in their order.
  void merge_partials() {
    for (int64_t r = 0; r < rows_; ++r) {
      float* out = s_.out + r * d_v_padded_;
      SoftmaxState state = {-INFINITY, 0.0f};
      for (int64_t x = 0; x < d_v_; ++x) out[x] = 0;
      for (int64_t split = 0; split < task_.num_splits; ++split) {
        const float* partial = task_.partials + (split * rows_ + r) * (2 + d_v_);
        const SoftmaxState merged = merge(state, {partial[0], partial[1]});
        const float old_factor = rescale_factor(state.max, merged.max), factor = rescale_factor(partial[0], merged.max);
        for (int64_t x = 0; x < d_v_; ++x) out[x] = out[x] * old_factor + partial[2 + x] * factor;
        state = merged;
      }
      s_.max[r] = state.max;
      s_.sum[r] = state.sum;
    }
  }

  void write_out() {
    for (int64_t r = 0; r < rows_; ++r) write_row(r);
  }

 private:
  int64_t head_of(int64_t r) const { return task_.first_head + r / task_.num_rows; }
  int64_t row_of(int64_t r) const { return task_.first_row + r % task_.num_rows; }  // within the sequence

  /// What a product of row r's query and a key is multiplied by.
  float scale_of(int64_t r) const { return descaled_softmax_scale(p_, task_.sequence_idx, head_of(r), task_.kv_head); }

  /// Query row r as floats, with its bias, normalised and rotated.
  void read_query(int64_t r, float* target) const {
    const TensorView& q = p_.query;
    const int64_t row = sequence_.first_row + row_of(r);
    const int64_t offset = sequence_.batch_idx * q.stride[0] + head_of(r) * q.stride[1] + row * q.stride[2];
    to_float(static_cast<const char*>(q.data) + offset * size_of(q.dtype), q.dtype, target, d_);
    if (p_.query_bias.present) {
      const int64_t first = head_of(r) * p_.query_bias.stride[0];
      for (int64_t x = 0; x < d_; ++x) target[x] = rounded(target[x] + element(p_.query_bias.data, q.dtype, first + x), q.dtype);
    }
    transform_.apply(target, row, position_of_query(step_, row_of(r)));
  }

  /// Calls f(Count<rows of the group>, first row) over all rows.
  template <typename F>
  void for_groups(F&& f) {
    int64_t r = 0;
    for (; rows_ - r >= kRows && !few_rows_; r += kRows) f(Count<kRows>{}, r);
    for (; rows_ - r >= kSmallGroup && !few_rows_; r += kSmallGroup) f(Count<kSmallGroup>{}, r);
    for (; r < rows_; ++r) f(Count<1>{}, r);
  }

  void pack_query() {
    const int64_t d_padded = round_up(d_, kLanes);
    for_groups([&](auto count, int64_t first) {
      for (int64_t m = 0; m < count.value; ++m) {
        read_query(first + m, s_.staging);
        const float scale = scale_of(first + m);
        float* packed = s_.query + (few_rows_ ? first * d_padded : first * d_ + m);
        for (int64_t x = 0; x < d_; ++x) packed[x * count.value] = s_.staging[x] * scale;
        for (int64_t x = d_; x < d_padded && few_rows_; ++x) packed[x] = 0;
      }
    });
  }

  void attend_tile(int64_t first, int64_t n) {
    const bool pack_values = !value_.vectors() || rows_ >= kRowsToPackValues;
    if (few_rows_) {
      score_few_rows(s_.query, rows_, key_, first, n, s_.scores, kScoresStride, s_.staging);
    } else {
      pack_transposed(key_, first, n, s_.keys, s_.staging);
    }
    if (pack_values) pack_rows(value_, first, n, round_up(n, kLanes), s_.values, s_.staging);
    const int64_t next = first + tile_, end = next + tile_ < task_.key_end ? next + tile_ : task_.key_end;
    for_groups([&](auto count, int64_t r) {
      // Each group fetches its share of the next tile, so that packing does not wait for memory.
      for (int64_t j = next + r * tile_ / rows_; j < next + (r + count.value) * tile_ / rows_ && j < end; ++j) {
        prefetch_row(key_, j), prefetch_row(value_, j);
      }
      attend_group<count.value>(r, first, n, pack_values);
    });
  }

  /// Rows r … r + kGroup - 1 against the keys of one tile, as far as any of the rows sees them.
  template <int kGroup>
  void attend_group(int64_t r, int64_t first, int64_t n, bool packed_values) {
    int64_t top = row_of(r), bottom = top;
    for (int64_t m = 1; m < kGroup; ++m) {
      const int64_t i = row_of(r + m);
      top = i < top ? i : top, bottom = i > bottom ? i : bottom;
    }
    const KeyRange range = sequence_.mask.key_range(top, bottom), full = sequence_.mask.full_range(top, bottom);
    const int64_t padded = round_up(n, kLanes);
    const int64_t begin = range.begin > first ? (range.begin - first) / kPanel * kPanel : 0;
    const int64_t stop = range.end - first < n ? range.end - first : n;
    if (begin >= stop) return;
    const int64_t end = round_up(stop, kPanel) < padded ? round_up(stop, kPanel) : padded;
    float* group_scores = few_rows_ ? s_.scores + r * kScoresStride : s_.scores;
    for (int64_t c = begin; c < end && !few_rows_; c += kPanel) {
      const int64_t width = panel_width(c, padded);
      multiply_panel<kGroup, 1, kGroup>(width, s_.query + r * d_, s_.keys + c * d_, width, d_, group_scores + c, kScoresStride,
                                        nullptr);
    }
    const bool unmasked = full.begin <= first + begin && full.end >= first + end && end <= n;
    for (int m = 0; m < kGroup && !(plain_ && unmasked); ++m) {
      float* scores = group_scores + m * kScoresStride;
      if (!plain_) apply_rules(scores, begin, end, r + m, first);
      if (!unmasked) hide(scores, begin, end, sequence_.mask.key_range(row_of(r + m), row_of(r + m)), first, n);
    }
    float factors[kGroup + kStatePadding];
    softmax_step<kGroup>(group_scores, kScoresStride, begin, end, s_.max + r, s_.sum + r, factors);
    if (packed_values) {
      add_values<kGroup>(r, group_scores + begin, begin, end, s_.values, 0, padded, factors);
    } else {
      add_values_in_place<kGroup>(r, group_scores, begin, end < n ? end : n, first, factors);
    }
  }

  /// add_values on the values where they are: a run of rows that lie one stride apart after the other.
  template <int kGroup>
  void add_values_in_place(int64_t r, const float* scores, int64_t begin, int64_t end, int64_t first, const float* factors) {
    float ones[kGroup];
    for (float& one : ones) one = 1;
    for (int64_t c = begin; c < end; factors = ones) {
      const int64_t run = value_.run(first + c, end - c);
      const float* values = static_cast<const float*>(value_.row(first + c));
      add_values<kGroup>(r, scores + c, 0, values != nullptr ? run : 0, values, value_.stride_bytes / 4, 0, factors);
      c += run;
    }
  }

  /// out = factors * out + weights times values [begin, end). stride 0: packed in panels of `padded` rows.
  template <int kGroup>
  void add_values(int64_t r, const float* weights, int64_t begin, int64_t end, const float* values, int64_t stride,
                  int64_t padded, const float* factors) {
    for (int64_t x = 0; x < d_v_padded_; x += kPanel) {
      const int64_t width = panel_width(x, d_v_padded_), ld = stride == 0 ? width : stride;
      const float* right = (stride == 0 ? values + x * padded : values + x) + begin * ld;
      float* out = s_.out + r * d_v_padded_ + x;
      multiply_panel<kGroup, kScoresStride, 1>(width, weights, right, ld, end - begin, out, d_v_padded_, factors);
    }
  }

  /// Softcap, bias, ALiBi and the mask tensor, in the operator's order.
  void apply_rules(float* scores, int64_t begin, int64_t end, int64_t r, int64_t first) {
    const int64_t h = head_of(r), i = row_of(r), b = sequence_.batch_idx;
    if (p_.softcap != 0) cap_row(scores, begin, end, p_.softcap);
    if (p_.bias.present) add_bias(scores, begin, end, tensor_row(p_.bias, b, h, i), position_of(first), s_.staging);
    if (p_.alibi_slopes.present) {
      const int64_t at = task_.sequence_idx * p_.alibi_slopes.stride[0] + h * p_.alibi_slopes.stride[1];
      add_alibi(scores, begin, end, static_cast<const float*>(p_.alibi_slopes.data)[at], i + sequence_.mask.query_offset, first);
    }
    if (p_.mask.present) apply_mask(scores, begin, end, tensor_row(p_.mask, b, h, i), position_of(first));
  }

  /// Of a key in its sequence: the columns of mask and bias count from there.
  int64_t position_of(int64_t key) const { return step_.first_position + key; }

  /// -inf outside the keys that the row sees, and outside the n of the tile.
  void hide(float* scores, int64_t begin, int64_t end, KeyRange seen, int64_t first, int64_t n) {
    const int64_t from = seen.begin - first, to = seen.end - first < n ? seen.end - first : n;
    for (int64_t c = begin; c < end && c < from; ++c) scores[c] = -INFINITY;
    for (int64_t c = to > begin ? to : begin; c < end; ++c) scores[c] = -INFINITY;
  }

  void write_row(int64_t r) {
    const int64_t h = head_of(r), row = sequence_.first_row + row_of(r), b = sequence_.batch_idx;
    if (s_.sum[r] == s_.sum[r] && has_nan(s_.out + r * d_v_padded_)) attend_row(r);
    SoftmaxState state = {s_.max[r], s_.sum[r]};
    float factor = normalizer(state);
    const float* source = s_.out + r * d_v_padded_;
    if (p_.sinks.present) {
      const float sink = static_cast<const float*>(p_.sinks.data)[p_.sinks.shape[0] > 1 ? h * p_.sinks.stride[0] : 0];
      const float max = state.max;
      state = add_sink(state, sink);
      factor = rescale_factor(max, state.max) * normalizer(state);
    }
    if (state.sum == 0 && p_.empty_row == EmptyRow::kMean) {
      source = mean_value();
      factor = 1;
    }
    if (state.sum == 0 && p_.empty_row == EmptyRow::kValue) {
      const TensorView& value = p_.empty_row_value;
      to_float(static_cast<const char*>(value.data) + h * value.stride[0] * size_of(value.dtype), value.dtype, s_.mean, d_v_);
      source = s_.mean;
      factor = 1;
    }
    const TensorView& o = p_.out;
    char* target = static_cast<char*>(o.data) + (b * o.stride[0] + h * o.stride[1] + row * o.stride[2]) * size_of(o.dtype);
    factor *= output_factor(p_, task_.sequence_idx, h, task_.kv_head);
    from_float(source, factor, target, o.dtype, d_v_);
    if (p_.lse.present) {
      static_cast<float*>(p_.lse.data)[b * p_.lse.stride[0] + h * p_.lse.stride[1] + row * p_.lse.stride[2]] = lse(state);
    }
  }

  bool has_nan(const float* row) const {
    bool found = false;
    for (int64_t x = 0; x < d_v_; ++x) found |= row[x] != row[x];
    return found;
  }

  /// Computes a row anew that came out NaN although its sum is a number: a value that is NaN or infinite stands at a key that the
  /// row doesn't see, and 0 times that is NaN. Here such keys are passed over.
  void attend_row(int64_t r) {
    const int64_t i = row_of(r);
    const float scale = scale_of(r);
    float* out = s_.out + r * d_v_padded_;
    float *query = s_.query, *key = s_.staging, *value = s_.staging + round_up(d_, kLanes);  // the packed queries are done with
    read_query(r, query);
    for (int64_t x = 0; x < d_v_; ++x) out[x] = 0;
    SoftmaxState state = {-INFINITY, 0.0f};
    const KeyRange range = sequence_.mask.key_range(i, i);
    for (int64_t j = range.begin; j < range.end; ++j) {
      read_row(key_, j, key);
      float score = 0;
      for (int64_t x = 0; x < d_; ++x) score += query[x] * scale * key[x];
      score = one_score(score, r, j);
      if (score == -INFINITY) continue;
      read_row(value_, j, value);
      const SoftmaxState merged = merge(state, {score, 1.0f});
      const float old_factor = rescale_factor(state.max, merged.max), factor = rescale_factor(score, merged.max);
      for (int64_t x = 0; x < d_v_; ++x) out[x] = out[x] * old_factor + factor * value[x];
      state = merged;
    }
    s_.max[r] = state.max;
    s_.sum[r] = state.sum;
  }

  /// What the rules of apply_rules make of one scaled product.
  float one_score(float score, int64_t r, int64_t j) {
    const int64_t h = head_of(r), i = row_of(r), b = sequence_.batch_idx;
    if (p_.softcap != 0) score = p_.softcap * tanhf(score * (1.0f / p_.softcap));
    if (p_.bias.present) {
      const TensorRow bias = tensor_row(p_.bias, b, h, i);
      const int64_t column = position_of(j);
      score = column < bias.keys ? score + element(bias.data, bias.dtype, column * bias.stride) : -INFINITY;
    }
    if (p_.alibi_slopes.present) {
      const int64_t at = task_.sequence_idx * p_.alibi_slopes.stride[0] + h * p_.alibi_slopes.stride[1];
      score += alibi_bias(static_cast<const float*>(p_.alibi_slopes.data)[at], i + sequence_.mask.query_offset, j);
    }
    if (p_.mask.present) {
      const TensorRow mask = tensor_row(p_.mask, b, h, i);
      const int64_t column = position_of(j);
      if (column >= mask.keys || !mask.data[column * mask.stride]) score = -INFINITY;
    }
    return score;
  }

  /// The mean of all values of the sequence, summed in double, when a row first asks for it.
  const float* mean_value() {
    if (has_mean_) return s_.mean;
    has_mean_ = true;
    double* sums = reinterpret_cast<double*>(s_.values);  // the last tile is done with; it had room for 64 rows
    for (int64_t x = 0; x < d_v_; ++x) sums[x] = 0;
    for (int64_t j = 0; j < sequence_.num_keys; ++j) {
      read_row(value_, j, s_.staging);
      for (int64_t x = 0; x < d_v_; ++x) sums[x] += s_.staging[x];
    }
    for (int64_t x = 0; x < d_v_; ++x)
      s_.mean[x] = static_cast<float>(sums[x] / (sequence_.num_keys > 0 ? sequence_.num_keys : 1));
    return s_.mean;
  }

  const StepParams& p_;
  const Task& task_;
  const Scratch s_;
  const CacheStep step_;
  const Sequence& sequence_;
  const int64_t rows_, tile_, d_, d_v_, d_v_padded_;
  const Rows key_, value_;  // of this sequence and head
  const RowTransform transform_;
  const bool few_rows_;  // too few to pack the keys for: each group is one row, query rows and scores lie one behind the other
  const bool plain_;     // scores need no rule but the scale and MaskRule
  bool has_mean_ = false;
};

size_t scratch_bytes(const Tiling& tiling) {
  const Scratch scratch(tiling, nullptr);
  return reinterpret_cast<size_t>(scratch.end);
}

void attend(const Tiling& tiling, const Task& task, void* memory) {
  TileKernel kernel(tiling, task, memory);
  kernel.attend();
  if (task.partials != nullptr) {
    kernel.write_partials();
  } else {
    kernel.write_out();
  }
}

void store(const StepParams& params, const CacheRule& steps, int which, int64_t sequence_idx, int64_t head, void* memory) {
  const CacheStep step = steps.at(sequence_idx);
  HeadStore(params, steps, step, which, sequence_idx, head, static_cast<float*>(memory)).run();
}

size_t store_bytes(const StepParams& params) { return HeadStore::store_floats(params) * sizeof(float); }

void merge_splits(const Tiling& tiling, const Task& task, void* memory) {
  TileKernel kernel(tiling, task, memory);
  kernel.merge_partials();
  kernel.write_out();
}

}  // namespace

#define FA_TEXT_(x) #x
#define FA_TEXT(x) FA_TEXT_(x)
extern const BackwardIsa kBackwardIsa;
extern const Isa kIsa;
const Isa kIsa = {FA_TEXT(FA_ISA), scratch_bytes, attend, merge_splits, store, store_bytes, &kBackwardIsa};

}  // namespace FA_ISA
}  // namespace fa::cpu
