// SPDX-License-Identifier: Apache-2.0
// Which steps the kernel of plain_step.cu takes, and its arguments.
#include "kernels/cache_step/plain_step.h"

#include <limits>

#include "semantics/transform.h"

namespace fa::cache_step {
namespace {

constexpr int64_t kMostColumns = 256;  // two groups of four for each lane of a warp

/// Rows of groups of four columns that begin at multiples of two elements.
bool has_groups(const TensorView& t) {
  bool fits = t.shape[3] % 4 == 0 && t.shape[3] <= kMostColumns && reinterpret_cast<uintptr_t>(t.data) % 4 == 0;
  for (int axis = 0; axis < 3; ++axis) fits = fits && (t.shape[axis] == 1 || t.stride[axis] % 2 == 0);
  return fits;
}

bool has_angles(const TensorView& t, DType dtype) {
  return t.dtype == dtype && t.shape[1] % 2 == 0 && t.stride[0] % 2 == 0 && reinterpret_cast<uintptr_t>(t.data) % 4 == 0;
}

PlainRows rows_of(const TensorView& from, const TensorView& to, int64_t rotated_columns) {
  return {row_move(from, to), static_cast<unsigned>(from.shape[3] / 4), static_cast<unsigned>(rotated_columns / 4)};
}

/// Are keys and values stored alike: as they are, or both as int8 or float8?
bool is_of_one_kind(const StepParams& p) {
  const bool has_scale = p.cache.key_scale.present, has_bytes = p.key.dtype == DType::kInt8 || p.key.dtype == DType::kFloat8E4M3;
  return has_scale == p.cache.value_scale.present && p.key.dtype == p.value.dtype && has_scale == has_bytes;
}

/// Rows of pages that 32 bits can number.
bool has_few_slots(const StepParams& p) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  return p.key.shape[0] * p.key.shape[2] <= kMost && cache_rule(p).rows <= kMost;
}

PlainPages pages_of(const StepParams& p) {
  const TensorView& table = p.cache.block_table;
  return {{table.data, table.shape[1] > 1 ? table.stride[1] : 0, table.dtype == DType::kInt64},
          table.shape[0] > 1 ? table.stride[0] : 0,
          Divisor(p.key.shape[2]),
          p.key.shape[0],
          index_view(p.cache.slot_mapping)};
}

}  // namespace

bool make_plain_args(const StepParams& p, const Step& step, PlainArgs* args) {
  const CacheParams& c = p.cache;
  const RotaryParams& rotary = p.rotary;
  const bool is_half = p.query.dtype == DType::kFloat16 || p.query.dtype == DType::kBFloat16;
  const bool is_paged = c.mode == CacheMode::kPaged, is_written_in_place = c.new_key.present && c.new_value.present &&
                                                                           c.past_key.present && c.past_key.data == p.key.data;
  if (!is_half || !is_written_in_place || c.new_key.empty() || !is_of_one_kind(p)) return false;
  if (is_paged ? step.cu_seqlens_kv.present || !has_few_slots(p) : c.mode != CacheMode::kWrite) return false;
  if (step.gathered[0].present || step.gathered[1].present) return false;
  if (p.norm.query_weight.present || p.norm.key_weight.present) return false;
  if (rotary.cos.present && !rotates_by_position(rotary)) return false;
  if (rotary.cos.present && !(has_angles(rotary.cos, p.query.dtype) && has_angles(rotary.sin, p.query.dtype))) return false;
  for (const TensorView* t : {&p.query, &p.key, &p.value, &c.new_key, &c.new_value})
    if (!has_groups(*t)) return false;
  const int64_t rotated = rotary.cos.present ? 2 * rotary.cos.shape[1] : 0;
  const int64_t query_heads = step.query.present ? p.query.shape[1] : 0, heads = query_heads + 2 * c.new_key.shape[1];
  const int64_t count = p.query.shape[0] * p.query.shape[2] * heads;
  if (count == 0 || count > std::numeric_limits<int32_t>::max()) return false;
  *args = {};
  args->rule = cache_rule(p);
  args->is_paged = is_paged;
  if (is_paged) args->pages = pages_of(p);
  if (step.query.present) args->moves[0] = rows_of(p.query, step.query, rotated);
  args->moves[1] = rows_of(c.new_key, p.key, rotated);
  args->moves[2] = rows_of(c.new_value, p.value, 0);
  args->first_head[1] = static_cast<unsigned>(query_heads);
  args->first_head[2] = static_cast<unsigned>(query_heads + c.new_key.shape[1]);
  args->heads = Divisor(heads);
  args->rows = Divisor(p.query.shape[2]);
  args->count = static_cast<unsigned>(count);
  if (rotary.cos.present) {
    args->cos = rotary.cos.data;
    args->sin = rotary.sin.data;
    args->cos_row = rotary.cos.stride[0];
    args->sin_row = rotary.sin.stride[0];
    args->last_angle = rotary.cos.shape[0] - 1;
  }
  args->interleaved = rotary.interleaved;
  args->bfloat16 = p.query.dtype == DType::kBFloat16;
  args->scales[0] = c.key_scale;
  args->scales[1] = c.value_scale;
  args->float8 = p.key.dtype == DType::kFloat8E4M3;
  args->kv_lengths = static_cast<int64_t*>(step.kv_lengths.data);
  args->query_offsets = static_cast<int64_t*>(step.query_offsets.data);
  return true;
}

}  // namespace fa::cache_step
