// SPDX-License-Identifier: Apache-2.0
// The support surface: one rule a line, each broken rule a sentence that names the tensor, what it has and what is expected.
// Called first by plan, max_workspace_bytes and explain. Looks at shapes, dtypes, strides and scalars, never at data.
#include <cmath>
#include <string>
#include <utility>

#include "fa/attention.h"
#include "rules.h"

namespace fa {
namespace {

bool is_quantized(DType dtype) { return dtype == DType::kInt8 || dtype == DType::kUInt8 || dtype == DType::kFloat8E4M3; }

/// Bytes that a row of `columns` elements takes as so many of this type; two int4 share a uint8.
int64_t stored_columns(DType dtype, int64_t columns) { return dtype == DType::kUInt8 ? (columns + 1) / 2 : columns; }

/// key (or value), which may be a quantized cache.
Status check_cache_dtype(const char* name, const TensorView& t, const char* scale_name, const TensorView& scale,
                         const StepParams& p) {
  if (scale.present) {
    FA_RULE(is_quantized(t.dtype), has_dtype(name, t, "int8, uint8 (two int4) or float8_e4m3fn, since it has scales"));
    FA_RULE(is_float(p.query.dtype), std::string(name) + " is a quantized cache, which does not go with a float8_e4m3fn query");
    FA_RULE(p.cache.new_key.present, std::string(name) + " has scales, expected a cache (past_key, past_value) with them");
  } else {
    const bool lacks_scale = p.cache.past_key.present && is_quantized(t.dtype) && is_float(p.query.dtype);
    FA_RULE(!lacks_scale,
            std::string("past_") + has_dtype(name, t, name_of(p.query.dtype)) + " as query, or " + scale_name + " beside it");
    FA_RULE(t.dtype == p.query.dtype, has_dtype(name, t, name_of(p.query.dtype)) + " as query");
  }
  return {};
}

Status check_operands(const StepParams& p) {
  FA_CHECK(check_operand("query", p.query));
  FA_RULE(is_float(p.query.dtype) || is_float8(p.query.dtype),
          has_dtype("query", p.query, "float32, float16, bfloat16 or float8_e4m3fn"));
  FA_CHECK(check_operand("key", p.key));
  FA_CHECK(check_operand("value", p.value));
  FA_CHECK(check_operand("out", p.out));
  const int64_t (&q)[4] = p.query.shape, (&k)[4] = p.key.shape;
  const int64_t heads_kv = k[1], head_dim_v = p.out.shape[3];
  FA_CHECK(check_cache_dtype("key", p.key, "k_scale", p.cache.key_scale, p));
  FA_CHECK(check_cache_dtype("value", p.value, "v_scale", p.cache.value_scale, p));
  if (is_float8(p.query.dtype)) {
    FA_RULE(is_float(p.out.dtype) || is_float8(p.out.dtype),
            has_dtype("out", p.out, "float32, float16, bfloat16 or float8_e4m3fn"));
  } else {
    FA_RULE(p.out.dtype == p.query.dtype, has_dtype("out", p.out, name_of(p.query.dtype)) + " as query");
  }
  // Sizes of 0 are fine where nothing has to be computed.
  FA_RULE(q[3] >= 1 || p.out.empty(), "query has head_dim " + std::to_string(q[3]) + ", expected at least 1");
  FA_RULE(p.value.shape[3] >= 1 || !p.lse.present,
          "value has head_dim " + std::to_string(p.value.shape[3]) + ", expected at least 1 beside an lse");
  FA_RULE(heads_kv >= 1 ? q[1] % heads_kv == 0 : q[1] == 0,
          "query has " + std::to_string(q[1]) + " heads and key " + std::to_string(heads_kv) + ", expected a multiple of key's");
  const int64_t batch = p.cache.mode == CacheMode::kPaged ? k[0] : q[0];
  const int64_t key_columns = stored_columns(p.key.dtype, q[3]);
  const int64_t value_columns = p.cache.value_scale.present ? stored_columns(p.value.dtype, head_dim_v) : p.value.shape[3];
  FA_CHECK(check_shape("key", p.key, {batch, heads_kv, k[2], key_columns}, 4, "batch, kv heads, keys, head_dim of query"));
  FA_CHECK(check_shape("value", p.value, {batch, heads_kv, k[2], value_columns}, 4, "batch, heads and rows of key, head_dim_v"));
  const int64_t out_columns = p.cache.value_scale.present ? head_dim_v : p.value.shape[3];
  FA_CHECK(check_shape("out", p.out, {q[0], q[1], q[2], out_columns}, 4, "batch, heads and rows of query, head_dim_v"));
  FA_CHECK(check_written("out", p.out, 4));
  if (!p.lse.present) return {};
  FA_RULE(p.lse.dtype == DType::kFloat32, has_dtype("lse", p.lse, "float32"));
  FA_CHECK(check_shape("lse", p.lse, {q[0], q[1], q[2], 1}, 3, "batch, heads and rows of query"));
  return check_written("lse", p.lse, 3);
}

/// mask or bias: [B, H_q, S_q, <= S_kv].
Status check_mask_shape(const char* name, const TensorView& t, const StepParams& p) {
  const int64_t (&q)[4] = p.query.shape;
  const int64_t keys = p.cache.mode == CacheMode::kWindow ? t.shape[3] : p.key.shape[2];  // columns are positions
  FA_RULE(t.shape[3] >= 0 && t.shape[3] <= keys, std::string(name) + " has " + std::to_string(t.shape[3]) +
                                                     " keys on its last axis, expected at most the " + std::to_string(keys) +
                                                     " of key");
  return check_shape(name, t, {q[0], q[1], q[2], t.shape[3]}, 4, "batch, heads and rows of query, at most the rows of key");
}

Status check_query_bias(const StepParams& p) {
  const TensorView& t = p.query_bias;
  if (!t.present) return {};
  FA_RULE(!is_float8(p.query.dtype), "query_bias is given, but query is float8_e4m3fn; expected float32, float16 or bfloat16");
  FA_RULE(t.dtype == p.query.dtype, has_dtype("query_bias", t, name_of(p.query.dtype)) + " as query");
  FA_CHECK(check_shape("query_bias", t, {p.query.shape[1], p.query.shape[3], 1, 1}, 2, "query heads, head_dim"));
  FA_RULE(t.empty() || t.shape[1] <= 1 || t.stride[1] == 1, "query_bias is not contiguous on its last axis");
  FA_RULE(!p.norm.query_weight.present && !p.norm.key_weight.present && !p.rotary.cos.present,
          "query_bias does not go together with a norm or a rotary embedding");
  return {};
}

Status check_empty_row(const StepParams& p) {
  const TensorView& t = p.empty_row_value;
  FA_RULE(t.present == (p.empty_row == EmptyRow::kValue), std::string("empty_row_value is ") + (t.present ? "given" : "missing") +
                                                              ", but rows without keys yield something else");
  if (!t.present) return {};
  FA_RULE(!is_float8(p.query.dtype),
          "empty_row_value is given, but query is float8_e4m3fn; expected float32, float16 or bfloat16");
  FA_RULE(t.dtype == p.query.dtype, has_dtype("empty_row_value", t, name_of(p.query.dtype)) + " as query");
  FA_CHECK(check_shape("empty_row_value", t, {p.query.shape[1], p.out.shape[3], 1, 1}, 2, "query heads, head_dim_v"));
  FA_RULE(t.empty() || t.shape[1] <= 1 || t.stride[1] == 1, "empty_row_value is not contiguous on its last axis");
  return {};
}

Status check_masks(const StepParams& p) {
  if (p.mask.present) {
    FA_RULE(p.mask.dtype == DType::kBool, has_dtype("mask", p.mask, "bool"));
    FA_CHECK(check_mask_shape("mask", p.mask, p));
  }
  if (p.bias.present) {
    FA_RULE(is_float(p.bias.dtype), has_dtype("bias", p.bias, "float32, float16 or bfloat16"));
    FA_CHECK(check_mask_shape("bias", p.bias, p));
  }
  return {};
}

Status check_index(const char* name, const TensorView& t, int64_t count, const char* axes) {
  if (!t.present) return {};
  FA_RULE(is_index(t.dtype), has_dtype(name, t, "int32 or int64"));
  return check_shape(name, t, {count, 1, 1, 1}, 1, axes);
}

Status check_packed(const StepParams& p) {
  const TensorView &cu_q = p.cu_seqlens_q, &cu_kv = p.cu_seqlens_kv;
  const bool paged = p.cache.mode == CacheMode::kPaged;
  FA_RULE(cu_q.present && (cu_kv.present || paged),
          std::string(cu_q.present ? "cu_seqlens_kv" : "cu_seqlens_q") + " is missing; both or none");
  FA_RULE(!cu_kv.present || !paged, "cu_seqlens_kv does not go together with a paged cache");
  FA_RULE(cu_q.dtype == DType::kInt32, has_dtype("cu_seqlens_q", cu_q, "int32"));
  FA_RULE(paged || cu_kv.dtype == DType::kInt32, has_dtype("cu_seqlens_kv", cu_kv, "int32"));
  FA_RULE(cu_q.shape[0] >= 1, "cu_seqlens_q is empty, expected [sequences + 1]");
  FA_CHECK(check_shape("cu_seqlens_q", cu_q, {cu_q.shape[0], 1, 1, 1}, 4, "sequences + 1"));
  if (!paged) FA_CHECK(check_shape("cu_seqlens_kv", cu_kv, {cu_q.shape[0], 1, 1, 1}, 1, "as cu_seqlens_q"));
  FA_RULE(p.query.shape[0] == 1, "query has batch " + std::to_string(p.query.shape[0]) + ", expected 1 with packed sequences");
  FA_RULE(!p.mask.present, "mask does not go together with packed sequences (cu_seqlens)");
  FA_RULE(!p.bias.present, "bias does not go together with packed sequences (cu_seqlens)");
  FA_RULE(!p.kv_lengths.present || paged, "kv_lengths does not go together with packed sequences (cu_seqlens)");
  FA_RULE(!p.query_lengths.present, "query_lengths does not go together with packed sequences (cu_seqlens)");
  return {};
}

Status check_sequences(const StepParams& p) {
  int64_t batch = p.query.shape[0];
  if (p.cu_seqlens_q.present || p.cu_seqlens_kv.present) {
    FA_CHECK(check_packed(p));
    batch = p.cu_seqlens_q.shape[0] - 1;
  }
  FA_CHECK(check_index("kv_lengths", p.kv_lengths, batch, "batch"));
  FA_CHECK(check_index("query_lengths", p.query_lengths, batch, "batch"));
  FA_CHECK(check_index("query_offsets", p.query_offsets, batch, "batch"));
  const int64_t heads = p.query.shape[1];
  if (p.alibi_slopes.present) {
    FA_RULE(p.alibi_slopes.dtype == DType::kFloat32, has_dtype("alibi_slopes", p.alibi_slopes, "float32"));
    FA_CHECK(check_shape("alibi_slopes", p.alibi_slopes, {batch, heads, 1, 1}, 2, "batch, query heads"));
  }
  if (p.sinks.present) {
    FA_RULE(p.sinks.dtype == DType::kFloat32, has_dtype("sinks", p.sinks, "float32"));
    FA_CHECK(check_shape("sinks", p.sinks, {heads, 1, 1, 1}, 1, "query heads"));
  }
  return {};
}

/// The factors of a float8 problem, which have a meaning there alone.
Status check_descales(const StepParams& p) {
  const int64_t batch = p.cu_seqlens_q.present ? p.cu_seqlens_q.shape[0] - 1 : p.query.shape[0];
  const int64_t heads = p.query.shape[1], heads_kv = p.key.shape[1];
  const struct {
    const char* name;
    const TensorView& factors;
    int64_t heads;
  } rows[] = {{"query_descale", p.query_descale, heads},
              {"key_descale", p.key_descale, heads_kv},
              {"value_descale", p.value_descale, heads_kv},
              {"output_scale", p.output_scale, heads}};
  for (const auto& [name, t, count] : rows) {
    if (!t.present) continue;
    FA_RULE(is_float8(p.query.dtype),
            std::string(name) + " is given, but query is " + name_of(p.query.dtype) + "; expected float8_e4m3fn");
    FA_RULE(t.dtype == DType::kFloat32, has_dtype(name, t, "float32"));
    FA_CHECK(check_shape(name, t, {batch, count, 1, 1}, 2, "batch, heads"));
  }
  FA_RULE(!p.output_scale.present || is_float8(p.out.dtype),
          std::string("output_scale is given, but out is ") + name_of(p.out.dtype) + "; expected float8_e4m3fn");
  if (!is_float8(p.query.dtype)) return {};
  FA_RULE(!p.norm.query_weight.present && !p.norm.key_weight.present && !p.rotary.cos.present,
          "query is float8_e4m3fn, which does not go together with a norm or a rotary embedding");
  FA_RULE(p.cache.mode == CacheMode::kAppend, "query is float8_e4m3fn, which goes together with an appended past only");
  return {};
}

/// Factors of head_dim columns.
Status check_weight(const char* name, const TensorView& t, int64_t columns) {
  if (!t.present) return {};
  FA_RULE(is_float(t.dtype), has_dtype(name, t, "float32, float16 or bfloat16"));
  FA_RULE(t.shape[0] <= 1 || t.stride[0] == 1, std::string(name) + " is not contiguous");
  return check_shape(name, t, {columns, 1, 1, 1}, 1, "head_dim of query");
}

Status check_epsilon(const char* name, float epsilon) {
  FA_RULE(std::isfinite(epsilon) && epsilon >= 0, std::string(name) + " is " + std::to_string(epsilon) + ", expected 0 or more");
  return {};
}

Status check_norm(const StepParams& p) {
  FA_CHECK(check_weight("q_norm_weight", p.norm.query_weight, p.query.shape[3]));
  FA_CHECK(check_weight("k_norm_weight", p.norm.key_weight, p.query.shape[3]));
  FA_CHECK(check_epsilon("q_norm_epsilon", p.norm.query_epsilon));
  FA_CHECK(check_epsilon("k_norm_epsilon", p.norm.key_epsilon));
  FA_RULE(!p.norm.key_weight.present || p.cache.new_key.present, "k_norm_weight is given, but there are no new keys");
  return {};
}

Status check_rotary(const StepParams& p) {
  const RotaryParams& r = p.rotary;
  FA_RULE(r.cos.present == r.sin.present, std::string(r.cos.present ? "sin_cache" : "cos_cache") + " is missing; both or none");
  FA_RULE(r.cos.present || !r.position_ids.present, "position_ids are given, but no cos_cache and sin_cache");
  if (!r.cos.present) return {};
  const int last = r.by_row ? 2 : 1;
  const int64_t half = r.cos.shape[last], batch = p.query.shape[0], rows = p.query.shape[2];
  for (const auto& [name, t] : {std::pair{"cos_cache", &r.cos}, std::pair{"sin_cache", &r.sin}}) {
    FA_RULE(is_float(t->dtype), has_dtype(name, *t, "float32, float16 or bfloat16"));
    FA_RULE(t->empty() || t->shape[last] <= 1 || t->stride[last] == 1, std::string(name) + " is not contiguous on its last axis");
  }
  FA_RULE(half >= 1 && 2 * half <= p.query.shape[3], "cos_cache covers " + std::to_string(2 * half) +
                                                         " columns of a head, expected 2 to the " +
                                                         std::to_string(p.query.shape[3]) + " of query");
  FA_RULE(r.by_row || r.cos.shape[0] >= 1, "cos_cache has no rows");
  const int64_t by_row[4] = {batch, rows, half, 1}, by_position[4] = {r.cos.shape[0], half, 1, 1};
  FA_CHECK(check_shape("cos_cache", r.cos, r.by_row ? by_row : by_position, 3, "batch and rows of query, columns / 2"));
  FA_CHECK(check_shape("sin_cache", r.sin, r.by_row ? by_row : by_position, 3, "as cos_cache"));
  FA_RULE(p.cache.new_key.present, "cos_cache is given, but there are no new keys");
  FA_RULE(!(r.by_row || r.position_ids.present) || p.cache.new_key.shape[2] == rows || p.cache.new_key.shape[2] == 0,
          "key has " + std::to_string(p.cache.new_key.shape[2]) + " rows and query " + std::to_string(rows) +
              ", expected as many where position_ids, or rows of cos_cache, are given for both");
  if (!r.position_ids.present) return {};
  FA_RULE(is_index(r.position_ids.dtype), has_dtype("position_ids", r.position_ids, "int32 or int64"));
  return check_shape("position_ids", r.position_ids, {batch, rows, 1, 1}, 2, "batch and rows of query");
}

/// k_scale or v_scale.
Status check_scale(const char* name, const TensorView& t, int64_t heads, int64_t columns) {
  if (!t.present) return {};
  FA_RULE(t.dtype == DType::kFloat32, has_dtype(name, t, "float32"));
  return check_shape(name, t, {heads, columns, 1, 1}, 2, "kv heads, head_dim");
}

/// past_key or past_value, whose rows and the new ones go into `cache`.
Status check_past(const char* name, const TensorView& past, const TensorView& cache, const CacheParams& c) {
  if (!past.present) return {};
  FA_CHECK(check_operand(name, past));
  FA_RULE(past.dtype == cache.dtype, has_dtype(name, past, name_of(cache.dtype)) + " as its present");
  const int64_t new_rows = c.new_key.shape[2];
  const bool is_joined = c.mode == CacheMode::kAppend || (c.mode == CacheMode::kWindow && new_rows > 1);
  const int64_t most = is_joined ? cache.shape[2] - new_rows : cache.shape[2];
  const bool may_grow = c.mode == CacheMode::kWrite && past.shape[2] < most;
  return check_shape(name, past, {cache.shape[0], cache.shape[1], may_grow ? past.shape[2] : most, cache.shape[3]}, 4,
                     "batch, kv heads, rows, columns of its present");
}

/// Pages: blocks, and where the new rows go.
Status check_pages(const StepParams& p) {
  const CacheParams& c = p.cache;
  FA_RULE(p.cu_seqlens_q.present, "cu_seqlens_q is missing; a paged cache needs it");
  FA_RULE(c.block_table.present, "block_table is missing; a paged cache needs it");
  FA_RULE(is_index(c.block_table.dtype), has_dtype("block_table", c.block_table, "int32 or int64"));
  FA_RULE(p.key.shape[2] >= 1, "past_key has blocks without rows");
  const int64_t sequences = p.cu_seqlens_q.shape[0] - 1;
  FA_CHECK(check_shape("block_table", c.block_table, {sequences, c.block_table.shape[1], 1, 1}, 2, "sequences, blocks of one"));
  return check_index("slot_mapping", c.slot_mapping, c.new_key.shape[2], "new rows");
}

/// The new rows, the past that they join and the cache that both go to.
Status check_new_rows(const StepParams& p) {
  const CacheParams& c = p.cache;
  const int64_t heads = p.key.shape[1], head_dim_v = p.out.shape[3];
  FA_CHECK(check_operand("key", c.new_key));
  FA_RULE(c.new_key.dtype == p.query.dtype, has_dtype("key", c.new_key, name_of(p.query.dtype)) + " as query");
  const int64_t batch = p.query.shape[0], rows = c.new_key.shape[2];
  FA_CHECK(
      check_shape("key", c.new_key, {batch, heads, rows, p.query.shape[3]}, 4, "batch, kv heads, new rows, head_dim of query"));
  if (c.new_value.present) {
    FA_CHECK(check_operand("value", c.new_value));
    FA_RULE(c.new_value.dtype == p.query.dtype, has_dtype("value", c.new_value, name_of(p.query.dtype)) + " as query");
    FA_CHECK(check_shape("value", c.new_value, {batch, heads, rows, head_dim_v}, 4, "batch, heads and rows of key, head_dim_v"));
    FA_CHECK(check_written("value's cache", p.value, 4));
  }
  FA_CHECK(check_scale("k_scale", c.key_scale, heads, p.query.shape[3]));
  FA_CHECK(check_scale("v_scale", c.value_scale, heads, head_dim_v));
  FA_CHECK(check_past("past_key", c.past_key, p.key, c));
  FA_CHECK(check_past("past_value", c.past_value, p.value, c));
  return check_written("key's cache", p.key, 4);
}

Status check_cache(const StepParams& p) {
  const CacheParams& c = p.cache;
  if (!c.new_key.present) return {};
  FA_CHECK(check_new_rows(p));
  if (c.mode == CacheMode::kAppend) return {};
  const int64_t batch = p.query.shape[0], rows = c.new_key.shape[2];
  FA_RULE(rows == p.query.shape[2] || rows == 0, "key has " + std::to_string(rows) + " rows and query " +
                                                     std::to_string(p.query.shape[2]) +
                                                     ", expected as many, or none, with this cache");
  FA_RULE(c.past_key.present && c.past_value.present && c.new_value.present,
          "value, past_key or past_value is missing; this cache needs them");
  FA_RULE(c.write_indices.present || p.kv_lengths.present,
          "nonpad_kv_seqlen and write_indices are missing; this cache needs one of them");
  const int64_t sequences = p.cu_seqlens_q.present ? p.cu_seqlens_q.shape[0] - 1 : batch;
  FA_CHECK(check_index("write_indices", c.write_indices, sequences, "sequences"));
  FA_RULE(c.mode == CacheMode::kPaged || !p.cu_seqlens_q.present,
          "cu_seqlens_q does not go together with this cache; a paged one takes it");
  if (c.mode == CacheMode::kPaged) return check_pages(p);
  if (c.mode == CacheMode::kWrite) return {};
  FA_RULE(p.window_left >= 0 && p.window_right == 0, "a windowed cache needs left_window_size and is_causal");
  FA_RULE(c.past_key.shape[2] > p.window_left, "past_key has " + std::to_string(c.past_key.shape[2]) +
                                                   " rows, expected at least the " + std::to_string(p.window_left + 1) +
                                                   " of the window");
  return {};
}

/// Windows and offsets stay so small that their sum with a row or key does not overflow.
constexpr int64_t kMaxDistance = int64_t{1} << 60;

Status check_scalars(const StepParams& p) {
  FA_RULE(std::isfinite(p.softmax_scale), "softmax_scale is " + std::to_string(p.softmax_scale) + ", expected a finite number");
  FA_RULE(std::isfinite(p.softcap) && p.softcap >= 0, "softcap is " + std::to_string(p.softcap) + ", expected 0 (none) or more");
  FA_RULE(p.window_left >= -1, "window_left is " + std::to_string(p.window_left) + ", expected -1 (open) or more");
  FA_RULE(p.window_right >= -1, "window_right is " + std::to_string(p.window_right) + ", expected -1 (open), 0 (causal) or more");
  FA_RULE(p.window_left <= kMaxDistance && p.window_right <= kMaxDistance, "a window is above 2^60, expected -1 for an open one");
  FA_RULE(p.query_offset >= -kMaxDistance && p.query_offset <= kMaxDistance,
          "query_offset is " + std::to_string(p.query_offset) + ", expected at most 2^60 either way");
  return {};
}

}  // namespace

std::string shape_text(const int64_t* shape, int rank) {
  std::string text = "[";
  for (int i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

Status validate(const StepParams& params) {
  FA_CHECK(check_operands(params));
  FA_CHECK(check_query_bias(params));
  FA_CHECK(check_empty_row(params));
  FA_CHECK(check_masks(params));
  FA_CHECK(check_sequences(params));
  FA_CHECK(check_descales(params));
  FA_CHECK(check_norm(params));
  FA_CHECK(check_rotary(params));
  FA_CHECK(check_cache(params));
  return check_scalars(params);
}

}  // namespace fa
