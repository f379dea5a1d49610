// SPDX-License-Identifier: Apache-2.0
// The support surface: one rule a line, each broken rule a sentence that names the tensor, what it has and what is expected.
// Called first by plan, max_workspace_bytes and explain. Looks at shapes, dtypes, strides and scalars, never at data.
#include <cmath>
#include <string>

#include "fa/attention.h"

// NOTE: the sentence is built only where the rule is broken; a decode step calls this for every layer.
#define FA_RULE(holds, sentence)               \
  if (!(holds)) return Status {                \
      StatusCode::kInvalidArgument, (sentence) \
    }
#define FA_CHECK(call) \
  if (Status status = (call); !status.ok()) return status

namespace fa {
namespace {

bool is_float(DType dtype) { return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16; }
bool is_index(DType dtype) { return dtype == DType::kInt32 || dtype == DType::kInt64; }

std::string has_dtype(const char* name, const TensorView& t, const char* expected) {
  return std::string(name) + " has dtype " + name_of(t.dtype) + ", expected " + expected;
}

/// Shape equals `expected`, of which the first `rank` axes are spoken of.
Status check_shape(const char* name, const TensorView& t, const int64_t (&expected)[4], int rank, const char* axes) {
  for (int i = 0; i < 4; ++i) {
    FA_RULE(t.shape[i] == expected[i], std::string(name) + " has shape " + shape_text(t.shape, rank) + ", expected " +
                                           shape_text(expected, rank) + " (" + axes + ")");
  }
  return {};
}

/// Elements, empty axes counted as 1, so that no product of sizes overflows: -1 for more than any memory has.
int64_t count_elements(const int64_t (&shape)[4]) {
  constexpr int64_t kMostElements = int64_t{1} << 56;
  int64_t count = 1;
  for (int64_t size : shape) {
    if (size > kMostElements / count) return -1;
    if (size > 0) count *= size;
  }
  return count;
}

/// One of query, key, value and out: there, with a contiguous last axis.
Status check_operand(const char* name, const TensorView& t) {
  FA_RULE(t.present, std::string(name) + " is missing");
  FA_RULE(is_float(t.dtype), has_dtype(name, t, "float32, float16 or bfloat16"));
  for (int64_t size : t.shape) FA_RULE(size >= 0, std::string(name) + " has a negative size: " + shape_text(t.shape, 4));
  FA_RULE(count_elements(t.shape) >= 0, std::string(name) + " has shape " + shape_text(t.shape, 4) + ", more than fits a memory");
  FA_RULE(t.empty() || t.shape[3] <= 1 || t.stride[3] == 1,
          std::string(name) + " has stride " + std::to_string(t.stride[3]) + " on its last axis, expected 1 (contiguous)");
  return {};
}

/// An output must not fold several elements onto one address.
Status check_written(const char* name, const TensorView& t, int rank) {
  for (int i = 0; i < rank; ++i) {
    FA_RULE(t.empty() || t.shape[i] <= 1 || t.stride[i] != 0,
            std::string(name) + " has stride 0 on axis " + std::to_string(i) + ", but it is written");
  }
  return {};
}

Status check_operands(const AttentionParams& p) {
  FA_CHECK(check_operand("query", p.query));
  FA_CHECK(check_operand("key", p.key));
  FA_CHECK(check_operand("value", p.value));
  FA_CHECK(check_operand("out", p.out));
  const int64_t (&q)[4] = p.query.shape, (&k)[4] = p.key.shape;
  const int64_t heads_kv = k[1], head_dim_v = p.value.shape[3];
  FA_RULE(p.key.dtype == p.query.dtype, has_dtype("key", p.key, name_of(p.query.dtype)) + " as query");
  FA_RULE(p.value.dtype == p.query.dtype, has_dtype("value", p.value, name_of(p.query.dtype)) + " as query");
  FA_RULE(p.out.dtype == p.query.dtype, has_dtype("out", p.out, name_of(p.query.dtype)) + " as query");
  FA_RULE(q[1] >= 1, "query has " + std::to_string(q[1]) + " heads, expected at least 1");
  FA_RULE(q[3] >= 1, "query has head_dim " + std::to_string(q[3]) + ", expected at least 1");
  FA_RULE(head_dim_v >= 1, "value has head_dim " + std::to_string(head_dim_v) + ", expected at least 1");
  FA_RULE(heads_kv >= 1 && q[1] % heads_kv == 0,
          "query has " + std::to_string(q[1]) + " heads and key " + std::to_string(heads_kv) + ", expected a multiple of key's");
  FA_CHECK(check_shape("key", p.key, {q[0], heads_kv, k[2], q[3]}, 4, "batch, kv heads, keys, head_dim of query"));
  FA_CHECK(check_shape("value", p.value, {q[0], heads_kv, k[2], head_dim_v}, 4, "batch, heads and rows of key, head_dim_v"));
  FA_CHECK(check_shape("out", p.out, {q[0], q[1], q[2], head_dim_v}, 4, "batch, heads and rows of query, head_dim_v"));
  FA_CHECK(check_written("out", p.out, 4));
  if (!p.lse.present) return {};
  FA_RULE(p.lse.dtype == DType::kFloat32, has_dtype("lse", p.lse, "float32"));
  FA_CHECK(check_shape("lse", p.lse, {q[0], q[1], q[2], 1}, 3, "batch, heads and rows of query"));
  return check_written("lse", p.lse, 3);
}

/// mask or bias: [B, H_q, S_q, <= S_kv].
Status check_mask_shape(const char* name, const TensorView& t, const AttentionParams& p) {
  const int64_t (&q)[4] = p.query.shape;
  const int64_t keys = p.key.shape[2];
  FA_RULE(t.shape[3] >= 0 && t.shape[3] <= keys, std::string(name) + " has " + std::to_string(t.shape[3]) +
                                                     " keys on its last axis, expected at most the " + std::to_string(keys) +
                                                     " of key");
  return check_shape(name, t, {q[0], q[1], q[2], t.shape[3]}, 4, "batch, heads and rows of query, at most the rows of key");
}

Status check_masks(const AttentionParams& p) {
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

Status check_packed(const AttentionParams& p) {
  const TensorView &cu_q = p.cu_seqlens_q, &cu_kv = p.cu_seqlens_kv;
  FA_RULE(cu_q.present && cu_kv.present,
          std::string(cu_q.present ? "cu_seqlens_kv" : "cu_seqlens_q") + " is missing; both or none");
  FA_RULE(cu_q.dtype == DType::kInt32, has_dtype("cu_seqlens_q", cu_q, "int32"));
  FA_RULE(cu_kv.dtype == DType::kInt32, has_dtype("cu_seqlens_kv", cu_kv, "int32"));
  FA_RULE(cu_q.shape[0] >= 1, "cu_seqlens_q is empty, expected [sequences + 1]");
  FA_CHECK(check_shape("cu_seqlens_q", cu_q, {cu_q.shape[0], 1, 1, 1}, 4, "sequences + 1"));
  FA_CHECK(check_shape("cu_seqlens_kv", cu_kv, {cu_q.shape[0], 1, 1, 1}, 1, "as cu_seqlens_q"));
  FA_RULE(p.query.shape[0] == 1, "query has batch " + std::to_string(p.query.shape[0]) + ", expected 1 with packed sequences");
  FA_RULE(!p.mask.present, "mask does not go together with packed sequences (cu_seqlens)");
  FA_RULE(!p.bias.present, "bias does not go together with packed sequences (cu_seqlens)");
  FA_RULE(!p.kv_lengths.present, "kv_lengths does not go together with packed sequences (cu_seqlens)");
  FA_RULE(!p.query_lengths.present, "query_lengths does not go together with packed sequences (cu_seqlens)");
  return {};
}

Status check_sequences(const AttentionParams& p) {
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

/// Windows and offsets stay so small that their sum with a row or key does not overflow.
constexpr int64_t kMaxDistance = int64_t{1} << 60;

Status check_scalars(const AttentionParams& p) {
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

Status validate(const AttentionParams& params) {
  FA_CHECK(check_operands(params));
  FA_CHECK(check_masks(params));
  FA_CHECK(check_sequences(params));
  return check_scalars(params);
}

}  // namespace fa
