// SPDX-License-Identifier: Apache-2.0
// How many inputs a node has and which dtypes these may have, as inputs.def says, and row-major tensors (bind.h).
#include <algorithm>

#include "bind.h"

namespace fa::plugin {
namespace {

/// The words of the column `dtypes` of inputs.def.
enum class InputDTypes : uint8_t { FLOAT, OPERAND, SAME, CACHE, MASK, INDEX, INT32, FLOAT32, ANY };
constexpr InputDTypes kInputDTypes[kNumInputs] = {
#define FA_INPUT(identifier, name, dtypes, shape, meaning) InputDTypes::dtypes,
#include "fa/inputs.def"
#undef FA_INPUT
};

bool is_operand(DType dtype) { return is_float(dtype) || dtype == DType::kFloat8E4M3; }

/// What accepts() takes, in words: "float32, float16 or bfloat16".
std::string accepted_dtypes(Input input, DType query) {
  std::string text, last;
  for (const DType dtype : {DType::kBool, DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kInt32, DType::kInt64,
                            DType::kInt8, DType::kUInt8, DType::kFloat8E4M3}) {
    if (!accepts(input, dtype, query)) continue;
    if (!last.empty()) text += (text.empty() ? "" : ", ") + last;
    last = name_of(dtype);
  }
  text += (text.empty() ? "" : " or ") + last;
  return text + (input == Input::kKey || input == Input::kValue ? ", as query" : "");
}

}  // namespace

Status check_num_inputs(const Node& node, size_t count) {
  if (count == node.inputs.size()) return {};
  return invalid("the node has " + std::to_string(count) + " inputs; expected " + std::to_string(node.inputs.size()) +
                 ": query, key, value and what optional_inputs names ('" + node.attributes.optional_inputs + "')");
}

bool accepts(Input input, DType dtype, DType query) {
  switch (kInputDTypes[static_cast<int>(input)]) {
    case InputDTypes::FLOAT:
      return is_float(dtype);
    case InputDTypes::OPERAND:
      return is_operand(dtype);
    case InputDTypes::SAME:
      return is_operand(dtype) && dtype == query;
    case InputDTypes::CACHE:
      return (is_float(dtype) && dtype == query) || dtype == DType::kInt8 || dtype == DType::kUInt8 ||
             dtype == DType::kFloat8E4M3;
    case InputDTypes::MASK:
      return is_float(dtype) || dtype == DType::kBool;
    case InputDTypes::INDEX:
      return dtype == DType::kInt64 || dtype == DType::kInt32;
    case InputDTypes::INT32:
      return dtype == DType::kInt32;
    case InputDTypes::FLOAT32:
      return dtype == DType::kFloat32;
    case InputDTypes::ANY:
      return true;
  }
  return false;
}

Status check_dtype(Input input, std::optional<DType> dtype, DType query) {
  if (dtype && accepts(input, *dtype, query)) return {};
  return invalid(std::string(name_of(input)) + " is " + (dtype ? name_of(*dtype) : "of another dtype") + "; expected " +
                 accepted_dtypes(input, query));
}

Status check_output_dtype(const Node& node, DType query) {
  const std::string& named = node.attributes.output_dtype;
  if (named.empty() || query == DType::kFloat8E4M3 || named == name_of(query)) return {};
  return invalid("output_dtype is '" + named + "' and query " + name_of(query) +
                 "; expected the query's dtype, or a float8_e4m3fn query");
}

DType dtype_of(const Node& node, Output output, DType query, DType cache) {
  if (output == Output::kLse) return DType::kFloat32;
  if (output != Output::kOutput) return cache;
  if (query != DType::kFloat8E4M3) return query;
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kFloat8E4M3})
    if (node.attributes.output_dtype == name_of(dtype)) return dtype;
  return DType::kBFloat16;
}

Tensor contiguous(void* data, DType dtype, const int64_t* shape, size_t rank) {
  Tensor tensor;
  tensor.data = data;
  tensor.dtype = dtype;
  tensor.rank = static_cast<int>(rank);
  int64_t stride = 1;
  for (int i = static_cast<int>(rank < 4 ? rank : 4) - 1; i >= 0; --i) {
    tensor.shape[i] = shape[i];
    tensor.stride[i] = stride;
    // What overflows is more than fits a memory, which bind() refuses.
    (void)__builtin_mul_overflow(stride, shape[i] > 0 ? shape[i] : 1, &stride);
  }
  return tensor;
}

}  // namespace fa::plugin
