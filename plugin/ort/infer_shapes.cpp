// SPDX-License-Identifier: Apache-2.0
// Output shapes for ONNX Runtime while a model is loaded, numbers and symbols. Called by the runtime for every FlashAttention
// node before its kernel exists. A node that is wrong gets no shape here and its sentence from create_kernel. NOTE: ONNX Runtime
// drops the returned status without releasing it (to 1.31): null is returned always.
#include <algorithm>
#include <atomic>

#include "op.h"
#include "output_shape.h"

namespace fa::plugin {
namespace {

/// value >= 0, or a symbol, or neither: unknown.
struct Dim {
  int64_t value = -1;
  std::string symbol;
};

struct Symbols {
  static Dim constant(int64_t value) { return {value, ""}; }
  static Dim sum(const Dim& a, const Dim& b) {
    if (a.value >= 0 && b.value >= 0) return {a.value + b.value, ""};
    const std::string left = text_of(a), right = text_of(b);
    return {-1, left.empty() || right.empty() ? "" : left + " + " + right};
  }
  static Dim larger(const Dim& a, const Dim& b) {
    if (a.value >= 0 && b.value >= 0) return {std::max(a.value, b.value), ""};
    return a.value < 0 && b.value < 0 && a.symbol == b.symbol ? a : Dim{};
  }
  static Dim product(const Dim& a, const Dim& b) { return {a.value >= 0 && b.value >= 0 ? a.value * b.value : -1, ""}; }
  static Dim quotient(const Dim& a, const Dim& b) { return {a.value >= 0 && b.value > 0 ? a.value / b.value : -1, ""}; }
  static std::string text_of(const Dim& dim) { return dim.value >= 0 ? std::to_string(dim.value) : dim.symbol; }
};

/// An attribute of the node; the default where it has none.
template <class T>
void read(const OrtShapeInferContext* context, const char* name, OrtOpAttrType type, T* value) {
  const OrtApi& api = Ort::GetApi();
  const OrtOpAttr* attribute = nullptr;
  if (Ort::Status absent{api.ShapeInferContext_GetAttribute(context, name, &attribute)}; !absent.IsOK() || !attribute) return;
  size_t bytes = 0;
  if constexpr (std::is_arithmetic_v<T>) {
    T given = {};
    if (Ort::Status s{api.ReadOpAttr(attribute, type, &given, sizeof(T), &bytes)}; s.IsOK()) *value = given;
  } else {
    // NOTE: the names of all inputs have some 350 characters; from a longer list no shape is told. 1.18 counts a string's NUL,
    // later versions don't.
    T given(1024, typename T::value_type{});
    if (Ort::Status s{api.ReadOpAttr(attribute, type, given.data(), given.size() * sizeof(given[0]), &bytes)}; !s.IsOK()) return;
    given.resize(bytes / sizeof(given[0]));
    if constexpr (std::is_same_v<T, std::string>)
      if (!given.empty() && given.back() == '\0') given.pop_back();
    *value = given;
  }
}

Attributes read_attributes(const OrtShapeInferContext* context) {
  Attributes attributes;
#define FA_ATTRIBUTE(type, name, value, meaning) read(context, #name, ORT_OP_ATTR_##type, &attributes.name);
#include "fa/attributes.def"
#undef FA_ATTRIBUTE
  return attributes;
}

/// Shapes of the inputs; of rank 0 where the rank is unknown or above 4.
std::vector<Shape<Dim>> read_shapes(const OrtShapeInferContext* context, size_t num_inputs) {
  const OrtApi& api = Ort::GetApi();
  std::vector<Shape<Dim>> shapes(num_inputs);
  for (size_t i = 0; i < num_inputs; ++i) {
    OrtTensorTypeAndShapeInfo* info = nullptr;  // owned by the context
    Ort::ThrowOnError(api.ShapeInferContext_GetInputTypeShape(context, i, &info));
    size_t rank = 0;
    Ort::ThrowOnError(api.GetDimensionsCount(info, &rank));
    if (rank > 4) continue;
    int64_t dims[4];
    const char* symbols[4];
    Ort::ThrowOnError(api.GetDimensions(info, dims, rank));
    Ort::ThrowOnError(api.GetSymbolicDimensions(info, symbols, rank));
    shapes[i].rank = static_cast<int>(rank);
    for (size_t axis = 0; axis < rank; ++axis)
      shapes[i].dims[axis] = {dims[axis], dims[axis] < 0 && symbols[axis] ? symbols[axis] : ""};
  }
  return shapes;
}

ONNXTensorElementDataType type_of(const OrtShapeInferContext* context, size_t input) {
  OrtTensorTypeAndShapeInfo* info = nullptr;  // owned by the context
  Ort::ThrowOnError(Ort::GetApi().ShapeInferContext_GetInputTypeShape(context, input, &info));
  ONNXTensorElementDataType type;
  Ort::ThrowOnError(Ort::GetApi().GetTensorElementType(info, &type));
  return type;
}

void set_shape(OrtShapeInferContext* context, Output output, ONNXTensorElementDataType type, const Shape<Dim>& shape) {
  const OrtApi& api = Ort::GetApi();
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  Ort::ThrowOnError(api.CreateTensorTypeAndShapeInfo(&raw));
  const Ort::TensorTypeAndShapeInfo info(raw);
  // NOTE: without a symbol ONNX Runtime takes -1 for the size itself, and folds it into what later nodes read of the shape.
  static std::atomic<int64_t> num_unknown{0};
  std::string names[4];
  int64_t dims[4];
  const char* symbols[4];
  for (int axis = 0; axis < shape.rank; ++axis) {
    const Dim& dim = shape.dims[axis];
    dims[axis] = dim.value;
    names[axis] = dim.value < 0 && dim.symbol.empty() ? "fa_unknown_" + std::to_string(num_unknown++) : dim.symbol;
    symbols[axis] = names[axis].c_str();
  }
  Ort::ThrowOnError(api.SetTensorElementType(raw, type));
  Ort::ThrowOnError(api.SetDimensions(raw, dims, shape.rank));
  Ort::ThrowOnError(api.SetSymbolicDimensions(raw, symbols, shape.rank));
  Ort::ThrowOnError(api.ShapeInferContext_SetOutputTypeShape(context, static_cast<size_t>(output), raw));
}

void infer(OrtShapeInferContext* context, bool optional_outputs) {
  const OrtApi& api = Ort::GetApi();
  Node node;
  if (!make_node(read_attributes(context), &node).ok()) return;
  size_t num_inputs = 0;
  Ort::ThrowOnError(api.ShapeInferContext_GetInputCount(context, &num_inputs));
  if (num_inputs != node.inputs.size()) return;
  const std::vector<Shape<Dim>> shapes = read_shapes(context, num_inputs);
  Layouts layouts;
  if (!resolve_layouts(node, shapes[0].rank, shapes[1].rank, shapes[2].rank, &layouts).ok()) return;
  const std::optional<DType> query = dtype_of(type_of(context, 0));
  const int past = node.slot(Input::kPastKey);
  const std::optional<DType> cache = past < 0 ? query : dtype_of(type_of(context, static_cast<size_t>(past)));
  if (!query || !cache) return;
  Symbols symbols;
  const auto shape_of = [&](int slot) -> const Shape<Dim>& { return shapes[static_cast<size_t>(slot)]; };
  for (const Output output : node.outputs)
    if (output == Output::kOutput || optional_outputs)
      set_shape(context, output, element_type_of(dtype_of(node, output, *query, *cache)),
                output_shape<Dim>(node, output, shape_of, layouts, symbols));
}

}  // namespace

OrtStatus* infer_shapes(OrtShapeInferContext* context, bool optional_outputs) noexcept {
  try {
    infer(context, optional_outputs);
  } catch (const std::exception&) {
    // No shape: everything still runs.
  }
  return nullptr;
}

}  // namespace fa::plugin
