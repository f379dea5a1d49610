// SPDX-License-Identifier: Apache-2.0
// Which steps the kernel of transform_rows.cu takes, and its arguments.
#include "kernels/cache_step/transform_rows.h"

#include <algorithm>
#include <limits>

#include "kernels/common/aligned_rows.h"
#include "semantics/transform.h"

namespace fa::cache_step {
namespace {

constexpr int64_t kMostColumns = 256;  // eight for each lane of a warp
// Where a past is copied too, this kernel is a second launch, and fewer rows save less time in it than a launch takes.
constexpr int64_t kFewRows = 2048;

/// Rows of groups of eight columns, which are read four at a time.
bool has_groups(const TensorView& t) {
  return t.shape[3] % 8 == 0 && t.shape[3] <= kMostColumns && rows_aligned_to(t, 4 * size_of(t.dtype));
}

/// Angles of groups of four pairs.
bool has_angles(const RotaryParams& rotary, const TensorView& t) {
  const int axis = rotary.by_row ? 2 : 1;
  bool fits = t.shape[axis] % 4 == 0 && reinterpret_cast<uintptr_t>(t.data) % (4 * size_of(t.dtype)) == 0;
  for (int i = 0; i < axis; ++i) fits = fits && (t.shape[i] == 1 || t.stride[i] % 4 == 0);
  return fits;
}

bool has_weights(const TensorView& t) { return !t.present || reinterpret_cast<uintptr_t>(t.data) % (4 * size_of(t.dtype)) == 0; }

/// Do new rows only join those before them, unquantized, and do all tensors have as many?
bool is_simple(const StepParams& p) {
  const CacheParams& c = p.cache;
  const bool in_place = c.past_key.present && c.past_key.data == p.key.data;
  if (c.mode != CacheMode::kAppend || in_place || c.key_scale.present || c.value_scale.present) return false;
  if (rotates_by_position(p.rotary) && (p.cu_seqlens_q.present || p.cu_seqlens_kv.present)) return false;
  return !c.new_key.present || (c.new_key.shape[0] == p.query.shape[0] && c.new_key.shape[2] == p.query.shape[2]);
}

}  // namespace

bool make_rows_args(const StepParams& p, const Step& step, RowsArgs* args) {
  const CacheParams& c = p.cache;
  const RotaryParams& rotary = p.rotary;
  if (!is_simple(p) || !step.query.present) return false;
  if (rotary.cos.present && !(has_angles(rotary, rotary.cos) && has_angles(rotary, rotary.sin))) return false;
  if (!has_weights(p.norm.query_weight) || !has_weights(p.norm.key_weight)) return false;
  const TensorView *const from[] = {&p.query, &c.new_key, &c.new_value}, *const to[] = {&step.query, &p.key, &p.value};
  *args = {};
  args->rule = cache_rule(p);
  args->rotary = rotary;
  args->dtype = p.query.dtype;
  args->has_norm = p.norm.query_weight.present || p.norm.key_weight.present;
  int64_t heads = 0, columns = 0;
  for (int which = 0; which < 3; ++which) {
    args->first_head[which] = static_cast<unsigned>(heads);
    if (!from[which]->present) continue;
    if (!has_groups(*from[which]) || !has_groups(*to[which])) return false;
    const int64_t first_row = which == 0 ? 0 : args->rule.past_rows;
    args->sides[which] = {
        row_move(*from[which], *to[which], first_row), {}, 0, static_cast<unsigned>(from[which]->shape[3] / 8), 0};
    heads += from[which]->shape[1];
    columns = std::max(columns, from[which]->shape[3]);
  }
  for (int which = 0; which < 2; ++which) {
    RowsSide& side = args->sides[which];
    side.weight = which == 0 ? p.norm.query_weight : p.norm.key_weight;
    side.epsilon = which == 0 ? p.norm.query_epsilon : p.norm.key_epsilon;
    side.rotated_groups = static_cast<unsigned>(rotary_columns(rotary).num_pairs / 4);
  }
  const int64_t rows = p.query.shape[2], count = p.query.shape[0] * rows * heads;
  if (c.past_key.present && count < kFewRows) return false;
  if (count == 0 || count > std::numeric_limits<int32_t>::max() / 32) return false;
  args->heads = Divisor(heads);
  args->rows = Divisor(rows);
  args->count = static_cast<unsigned>(count);
  while (int64_t{8} << args->log2_lanes < columns) ++args->log2_lanes;
  return true;
}

}  // namespace fa::cache_step
