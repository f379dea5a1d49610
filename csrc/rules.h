// SPDX-License-Identifier: Apache-2.0
// Rules that the forward and the backward pass have in common: what validate.cpp, memory.cpp, dispatch.cpp and backward.cpp are
// written with.
#pragma once

#include <string>

#include "fa/attention.h"
#include "overlap.h"

// NOTE: the sentence is built only where the rule is broken; a decode step calls this for every layer.
#define FA_RULE(holds, sentence)               \
  if (!(holds)) return Status {                \
      StatusCode::kInvalidArgument, (sentence) \
    }
#define FA_CHECK(call) \
  if (Status status = (call); !status.ok()) return status

namespace fa {

inline bool is_float8(DType dtype) { return dtype == DType::kFloat8E4M3; }
inline bool is_index(DType dtype) { return dtype == DType::kInt32 || dtype == DType::kInt64; }

inline std::string has_dtype(const char* name, const TensorView& t, const char* expected) {
  return std::string(name) + " has dtype " + name_of(t.dtype) + ", expected " + expected;
}

/// Shape equals `expected`, of which the first `rank` axes are spoken of.
inline Status check_shape(const char* name, const TensorView& t, const int64_t (&expected)[4], int rank, const char* axes) {
  for (int i = 0; i < 4; ++i) {
    FA_RULE(t.shape[i] == expected[i], std::string(name) + " has shape " + shape_text(t.shape, rank) + ", expected " +
                                           shape_text(expected, rank) + " (" + axes + ")");
  }
  return {};
}

/// One of query, key, value and out, or a tensor of a cache: there, with a contiguous last axis.
inline Status check_operand(const char* name, const TensorView& t) {
  FA_RULE(t.present, std::string(name) + " is missing");
  for (int64_t size : t.shape) FA_RULE(size >= 0, std::string(name) + " has a negative size: " + shape_text(t.shape, 4));
  FA_RULE(!exceeds_memory(t.shape), std::string(name) + " has shape " + shape_text(t.shape, 4) + ", more than fits a memory");
  FA_RULE(t.empty() || t.shape[3] <= 1 || t.stride[3] == 1,
          std::string(name) + " has stride " + std::to_string(t.stride[3]) + " on its last axis, expected 1 (contiguous)");
  return {};
}

/// The elements of what is written have memory of their own each, but that those on an axis of stride 0 are one: for a sum.
inline Status check_sums(const char* name, const TensorView& t, int rank) {
  FA_RULE(!overlaps_itself(t), std::string(name) + " has strides " + shape_text(t.stride, rank) + " and shape " +
                                   shape_text(t.shape, rank) + ", so that its elements share memory, but it is written");
  return {};
}

/// An output must not fold several elements onto one address.
inline Status check_written(const char* name, const TensorView& t, int rank) {
  for (int i = 0; i < rank; ++i) {
    FA_RULE(t.empty() || t.shape[i] <= 1 || t.stride[i] != 0,
            std::string(name) + " has stride 0 on axis " + std::to_string(i) + ", but it is written");
  }
  return check_sums(name, t, rank);
}

/// Has the context what a plan of this kernel needs?
inline Status check_workspace(const char* kernel, size_t bytes, const ExecutionContext& context) {
  FA_RULE(bytes <= context.workspace_bytes && (bytes == 0 || context.workspace != nullptr),
          std::string(kernel) + " needs a workspace of " + std::to_string(bytes) + " bytes, but the context has " +
              std::to_string(context.workspace_bytes));
  return {};
}

}  // namespace fa
