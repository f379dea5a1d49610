// SPDX-License-Identifier: Apache-2.0
// Tensors of a call to AttentionParams: strides for layouts and broadcasts, the diagonal, the cache (bind.h). What can only be
// wrong because of a convention is refused here; the rest is fa::validate's.
#include "bind.h"

#include <algorithm>
#include <cmath>

#include "output_shape.h"

namespace fa::plugin {
namespace {

constexpr int64_t kMostElements = int64_t{1} << 56;

Status invalid(std::string sentence) { return {StatusCode::kInvalidArgument, std::move(sentence)}; }

Status wrong_shape(Input input, const Tensor& tensor, const std::string& expected) {
  return invalid(std::string(name_of(input)) + " has shape " + shape_text(tensor.shape, tensor.rank) + "; expected " + expected);
}

/// More elements than any memory has. Empty axes count as 1, so that no product of an input's sizes overflows.
bool exceeds_memory(const Tensor& tensor) {
  int64_t room = kMostElements;
  for (int i = 0; i < std::min(tensor.rank, 4); ++i)
    if (tensor.shape[i] > 1) room /= tensor.shape[i];
  return room == 0;
}

struct Numbers {
  static int64_t constant(int64_t value) { return value; }
  static int64_t sum(int64_t a, int64_t b) { return a + b; }
  static int64_t product(int64_t a, int64_t b) { return a * b; }
  static int64_t quotient(int64_t a, int64_t b) { return b == 0 ? 0 : a / b; }
};

TensorView view_of(const Tensor& tensor) {
  TensorView view;
  view.data = tensor.data;
  view.dtype = tensor.dtype;
  view.present = true;
  for (int i = 0; i < tensor.rank; ++i) {
    view.shape[i] = tensor.shape[i];
    view.stride[i] = tensor.stride[i];
  }
  return view;
}

char* advance(void* data, int64_t elements, DType dtype) {
  return data ? static_cast<char*>(data) + elements * size_of(dtype) : nullptr;
}

/// An operand as [B, H, S, D]. heads and head_dim describe a BSH tensor, column_* its columns.
TensorView view_BHSD(const Tensor& t, Layout layout, int64_t heads, int64_t head_dim, int64_t column_start,
                     int64_t column_stride) {
  TensorView view = view_of(t);
  if (layout == Layout::kBSHD) {
    std::swap(view.shape[1], view.shape[2]);
    std::swap(view.stride[1], view.stride[2]);
  } else if (layout == Layout::kBSH) {
    const int64_t shape[4] = {t.shape[0], heads, t.shape[1], head_dim};
    const int64_t stride[4] = {t.stride[0], column_stride * t.stride[2], t.stride[1], t.stride[2]};
    std::copy(shape, shape + 4, view.shape);
    std::copy(stride, stride + 4, view.stride);
    view.data = advance(t.data, column_start * t.stride[2], t.dtype);
  }
  return view;
}

/// The state of one bind(): the node, its tensors, the problem that grows.
class Binder {
 public:
  Binder(const Node& node, const std::vector<Tensor>& inputs, Problem* problem)
      : node_(node), attributes_(node.attributes), inputs_(inputs), problem_(*problem), params_(problem->params) {}

  Status bind() {
    if (Status s = check_inputs(); !s.ok()) return s;
    if (Status s = bind_operands(); !s.ok()) return s;
    make_outputs();
    if (Status s = bind_cache(); !s.ok()) return s;
    if (Status s = bind_lengths(); !s.ok()) return s;
    if (Status s = bind_masks(); !s.ok()) return s;
    if (Status s = bind_head_vectors(); !s.ok()) return s;
    set_scalars();
    return {};
  }

 private:
  const Tensor* find(Input input) const {
    const int slot = node_.slot(input);
    return slot < 0 ? nullptr : &inputs_[slot];
  }

  Status check_inputs() const {
    if (inputs_.size() != node_.inputs.size())
      return invalid("the node has " + std::to_string(inputs_.size()) + " inputs; expected " +
                     std::to_string(node_.inputs.size()) + ": query, key, value and what optional_inputs names ('" +
                     attributes_.optional_inputs + "')");
    for (size_t i = 0; i < inputs_.size(); ++i) {
      const Input input = node_.inputs[i];
      if (!accepts(input, inputs_[i].dtype, inputs_[0].dtype))
        return invalid(std::string(name_of(input)) + " is " + name_of(inputs_[i].dtype) + "; expected " +
                       accepted_dtypes(input, inputs_[0].dtype));
      if (inputs_[i].rank > 4 && input != Input::kUnused)
        return invalid(std::string(name_of(input)) + " has rank " + std::to_string(inputs_[i].rank) + "; expected 4 at most");
      if (exceeds_memory(inputs_[i])) return wrong_shape(input, inputs_[i], "a tensor that fits a memory");
    }
    return {};
  }

  /// One of query, key, value. `which` is 0, 1 or 2.
  Status bind_operand(int which, Layout layout, int64_t heads, int64_t head_dim, const char* heads_name, TensorView* view) const {
    const Input input = static_cast<Input>(which);
    const Tensor& t = inputs_[which];
    const bool packed = !attributes_.packed_columns.empty();
    int64_t start = 0, stride = head_dim;
    if (packed) {
      start = attributes_.packed_columns[2 * which];
      stride = attributes_.packed_columns[2 * which + 1];
      const int64_t columns = start + (heads - 1) * stride + head_dim;
      if (columns > t.shape[2])
        return wrong_shape(input, t, "at least " + std::to_string(columns) + " columns, as packed_columns says");
    } else if (layout == Layout::kBSH) {
      if (t.shape[2] % heads != 0)
        return wrong_shape(input, t,
                           "a last axis that is a multiple of " + std::string(heads_name) + " = " + std::to_string(heads));
      if (head_dim > 0 && t.shape[2] / heads != head_dim)
        return wrong_shape(input, t, "a last axis of " + std::to_string(heads) + " heads of " + std::to_string(head_dim));
      stride = head_dim = t.shape[2] / heads;
    }
    *view = view_BHSD(t, layout, heads, head_dim, start, stride);
    if (heads > 0 && view->shape[1] != heads)
      return wrong_shape(input, t, std::string(heads_name) + " = " + std::to_string(heads) + " heads");
    if (head_dim > 0 && view->shape[3] != head_dim) return wrong_shape(input, t, "head_dim " + std::to_string(head_dim));
    return {};
  }

  Status bind_operands() {
    const Attributes& a = attributes_;
    if (Status s = resolve_layouts(node_, inputs_[0].rank, inputs_[1].rank, inputs_[2].rank, &layouts_); !s.ok()) return s;
    const int64_t dv = a.head_dim_v > 0 || a.packed_columns.empty() ? a.head_dim_v : a.head_dim;
    if (Status s = bind_operand(0, layouts_.query, a.q_num_heads, a.head_dim, "q_num_heads", &params_.query); !s.ok()) return s;
    if (Status s = bind_operand(1, layouts_.key, a.kv_num_heads, a.head_dim, "kv_num_heads", &params_.key); !s.ok()) return s;
    return bind_operand(2, layouts_.value, a.kv_num_heads, dv, "kv_num_heads", &params_.value);
  }

  void make_outputs() {
    std::vector<Shape<int64_t>> shapes(inputs_.size());
    for (size_t i = 0; i < inputs_.size(); ++i) {
      shapes[i].rank = inputs_[i].rank;
      std::copy(inputs_[i].shape, inputs_[i].shape + 4, shapes[i].dims);
    }
    Numbers numbers;
    for (const Output output : node_.outputs) {
      const Shape<int64_t> shape = output_shape(node_, output, shapes, layouts_, numbers);
      problem_.outputs[static_cast<int>(output)] =
          contiguous(nullptr, dtype_of(output, params_.query.dtype), shape.dims, shape.rank);
    }
    const Tensor& out = problem_.outputs[0];
    params_.out = view_BHSD(out, layouts_.output, params_.query.shape[1], params_.value.shape[3], 0, params_.value.shape[3]);
    const Tensor& lse = problem_.outputs[static_cast<int>(Output::kLse)];
    if (lse.rank > 0) params_.lse = view_of(lse);
  }

  /// One of keys (0) and values (1): past in front of fresh, in present.
  Status join(int which, Input input, Output output, TensorView* view) {
    const Tensor* past = find(input);
    if (!past && node_.slot(output) < 0) return {};
    int64_t shape[4] = {view->shape[0], view->shape[1], past ? past->shape[2] : 0, view->shape[3]};
    if (past && (past->rank != 4 || past->shape[0] != shape[0] || past->shape[1] != shape[1] || past->shape[3] != shape[3]))
      return wrong_shape(input, *past,
                         "[batch " + std::to_string(shape[0]) + ", heads " + std::to_string(shape[1]) +
                             ", any number of rows, head_dim " + std::to_string(shape[3]) + "], as " +
                             name_of(which == 0 ? Input::kKey : Input::kValue) + " has them");
    problem_.past[which] = view_of(past ? *past : contiguous(nullptr, view->dtype, shape, 4));
    problem_.fresh[which] = *view;
    shape[2] += view->shape[2];
    problem_.present[which] = view_of(contiguous(nullptr, view->dtype, shape, 4));
    if (past) *view = problem_.present[which];
    return {};
  }

  Status bind_cache() {
    if (Status s = join(0, Input::kPastKey, Output::kPresentKey, &params_.key); !s.ok()) return s;
    if (Status s = join(1, Input::kPastValue, Output::kPresentValue, &params_.value); !s.ok()) return s;
    problem_.has_past = node_.slot(Input::kPastKey) >= 0;
    if (problem_.has_past && problem_.past[0].shape[2] != problem_.past[1].shape[2])
      return wrong_shape(Input::kPastValue, *find(Input::kPastValue),
                         std::to_string(problem_.past[0].shape[2]) + " rows, as past_key has them");
    return {};
  }

  /// A vector of `size` elements, or, where may_repeat, of one element for all.
  Status bind_vector(Input input, int64_t size, const char* meaning, bool may_repeat, TensorView* view) const {
    const Tensor* t = find(input);
    if (!t) return {};
    const bool repeats = may_repeat && t->rank == 1 && t->shape[0] == 1;
    if (t->rank != 1 || (t->shape[0] != size && !repeats))
      return wrong_shape(input, *t, (may_repeat ? "[1] or [" : "[") + std::string(meaning) + " " + std::to_string(size) + "]");
    *view = view_of(*t);
    if (repeats) view->stride[0] = 0;
    view->shape[0] = size;
    return {};
  }

  Status bind_lengths() {
    num_sequences_ = params_.query.shape[0];
    if (const Tensor* cu = find(Input::kCuSeqlensQ)) {
      if (cu->rank != 1 || cu->shape[0] < 1) return wrong_shape(Input::kCuSeqlensQ, *cu, "[number of sequences + 1]");
      num_sequences_ = cu->shape[0] - 1;
      params_.cu_seqlens_q = view_of(*cu);
      if (Status s = bind_vector(Input::kCuSeqlensKv, cu->shape[0], "number of sequences + 1 =", false, &params_.cu_seqlens_kv);
          !s.ok())
        return s;
    }
    if (Status s = bind_vector(Input::kNonpadKvSeqlen, num_sequences_, "batch", false, &params_.kv_lengths); !s.ok()) return s;
    if (Status s = bind_vector(Input::kQueryLengths, num_sequences_, "batch", false, &params_.query_lengths); !s.ok()) return s;
    return bind_vector(Input::kQueryOffset, num_sequences_, "batch", true, &params_.query_offsets);
  }

  /// Broadcasts a mask or bias from the right to [B, H_q, S_q, S_kv].
  Status bind_mask(Input input, TensorView* view) const {
    const Tensor* t = find(input);
    if (!t) return {};
    const int64_t target[4] = {params_.query.shape[0], params_.query.shape[1], params_.query.shape[2], params_.key.shape[2]};
    const std::string expected = "something that broadcasts to [batch " + std::to_string(target[0]) + ", heads " +
                                 std::to_string(target[1]) + ", query rows " + std::to_string(target[2]) + ", keys " +
                                 std::to_string(target[3]) + "], rank 1 to 4";
    if (t->rank < 1) return wrong_shape(input, *t, expected);
    view->data = t->data;
    view->dtype = t->dtype;
    view->present = true;
    for (int axis = 0; axis < 4; ++axis) {
      const int from = axis - (4 - t->rank);
      const int64_t size = from < 0 ? 1 : t->shape[from];
      const bool shorter = axis == 3 && size < target[3] && size != 1;  // masks the keys beyond
      if (size != target[axis] && size != 1 && !shorter) return wrong_shape(input, *t, expected);
      view->shape[axis] = shorter ? size : target[axis];
      view->stride[axis] = size == target[axis] || shorter ? (from < 0 ? 0 : t->stride[from]) : 0;
    }
    return {};
  }

  Status bind_masks() {
    const Tensor* mask = find(Input::kAttnMask);
    const bool added = mask && mask->dtype != DType::kBool;
    if (added && find(Input::kAttnBias))
      return invalid("attn_mask is " + std::string(name_of(mask->dtype)) +
                     " and attn_bias is there too; expected a bool mask beside a bias");
    if (Status s = bind_mask(Input::kAttnMask, added ? &params_.bias : &params_.mask); !s.ok()) return s;
    return bind_mask(Input::kAttnBias, &params_.bias);
  }

  Status bind_head_vectors() {
    const int64_t heads = params_.query.shape[1];
    if (const Tensor* t = find(Input::kAlibiSlopes)) {
      const bool shared = t->rank == 1 && t->shape[0] == heads;
      if (!shared && (t->rank != 2 || t->shape[0] != num_sequences_ || t->shape[1] != heads))
        return wrong_shape(Input::kAlibiSlopes, *t,
                           "[heads " + std::to_string(heads) + "] or [batch " + std::to_string(num_sequences_) + ", heads " +
                               std::to_string(heads) + "]");
      params_.alibi_slopes = view_of(*t);
      if (shared) {
        const int64_t shape[2] = {num_sequences_, heads}, stride[2] = {0, t->stride[0]};
        std::copy(shape, shape + 2, params_.alibi_slopes.shape);
        std::copy(stride, stride + 2, params_.alibi_slopes.stride);
      }
    }
    return bind_vector(Input::kSinks, heads, "heads", false, &params_.sinks);
  }

  void set_scalars() {
    const Attributes& a = attributes_;
    const int64_t head_dim = params_.query.shape[3];
    params_.softmax_scale = a.scale != 0   ? a.scale
                            : head_dim > 0 ? static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim)))
                                           : 1.0f;
    params_.softcap = a.softcap;
    params_.window_left = a.left_window_size < kMostElements ? a.left_window_size : -1;
    params_.window_right = a.is_causal ? 0 : a.right_window_size < kMostElements ? a.right_window_size : -1;
    params_.empty_row = a.empty_row == "mean" ? EmptyRow::kMean : EmptyRow::kZero;
    if (a.float32_precision == "tf32") params_.float32_precision = Float32Precision::kTf32;
    params_.align_bottom_right = a.alignment == "bottom_right" || (a.alignment == "onnx" && params_.kv_lengths.present);
    if (!params_.align_bottom_right && problem_.has_past) params_.query_offset = problem_.past[0].shape[2];
  }

  const Node& node_;
  const Attributes& attributes_;
  const std::vector<Tensor>& inputs_;
  Problem& problem_;
  AttentionParams& params_;
  Layouts layouts_{};
  int64_t num_sequences_ = 0;
};

/// The words of the column `dtypes` of inputs.def.
enum class InputDTypes : uint8_t { FLOAT, SAME, MASK, INDEX, INT32, FLOAT32, ANY };
constexpr InputDTypes kInputDTypes[kNumInputs] = {
#define FA_INPUT(identifier, name, dtypes, shape, meaning) InputDTypes::dtypes,
#include "fa/inputs.def"
#undef FA_INPUT
};

bool is_floating(DType dtype) { return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16; }

constexpr size_t kAlignment = 256;
size_t align(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

size_t bytes_of(const TensorView& view) {
  return align(static_cast<size_t>(view.shape[0] * view.shape[1] * view.shape[2] * view.shape[3]) * size_of(view.dtype));
}

/// Does the joined cache of keys (0) or values (1) live in the workspace?
bool joins_in_workspace(const Problem& problem, int which) { return problem.has_past && problem.outputs[1 + which].rank == 0; }

size_t joined_bytes(const Problem& problem) {
  size_t bytes = 0;
  for (int which = 0; which < 2; ++which)
    if (joins_in_workspace(problem, which)) bytes += bytes_of(problem.present[which]);
  return bytes;
}

/// Where the joined keys (0) or values (1) go; with a past, attention reads them there.
void set_present(Problem* problem, int which, void* data) {
  problem->present[which].data = data;
  if (problem->has_past) (which == 0 ? problem->params.key : problem->params.value).data = data;
}

}  // namespace

bool accepts(Input input, DType dtype, DType query) {
  switch (kInputDTypes[static_cast<int>(input)]) {
    case InputDTypes::FLOAT:
      return is_floating(dtype);
    case InputDTypes::SAME:
      return is_floating(dtype) && dtype == query;
    case InputDTypes::MASK:
      return is_floating(dtype) || dtype == DType::kBool;
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

std::string accepted_dtypes(Input input, DType query) {
  std::string text;
  for (const DType dtype : {DType::kBool, DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kInt32, DType::kInt64})
    if (accepts(input, dtype, query)) text += (text.empty() ? "" : " or ") + std::string(name_of(dtype));
  return text + (input == Input::kKey || input == Input::kValue ? ", as query" : "");
}

DType dtype_of(Output output, DType query) { return output == Output::kLse ? DType::kFloat32 : query; }

Tensor contiguous(void* data, DType dtype, const int64_t* shape, size_t rank) {
  Tensor tensor;
  tensor.data = data;
  tensor.dtype = dtype;
  tensor.rank = static_cast<int>(rank);
  int64_t stride = 1;
  for (int i = static_cast<int>(rank < 4 ? rank : 4) - 1; i >= 0; --i) {
    tensor.shape[i] = shape[i];
    tensor.stride[i] = stride;
    stride *= shape[i] > 0 ? shape[i] : 1;
  }
  return tensor;
}

Status bind(const Node& node, const std::vector<Tensor>& inputs, Problem* problem) {
  *problem = Problem{};
  return Binder(node, inputs, problem).bind();
}

void set_output(Problem* problem, Output output, void* data) {
  problem->outputs[static_cast<int>(output)].data = data;
  if (output == Output::kOutput) problem->params.out.data = data;
  if (output == Output::kLse) problem->params.lse.data = data;
  if (output == Output::kPresentKey) set_present(problem, 0, data);
  if (output == Output::kPresentValue) set_present(problem, 1, data);
}

Status plan(const Problem& problem, const Device& device, Plan* plan, const char* kernel) {
  *plan = {};
  if (Status s = fa::plan(problem.params, device, &plan->attention, kernel); !s.ok()) return s;
  plan->joined_bytes = joined_bytes(problem);
  plan->workspace_bytes = plan->joined_bytes + plan->attention.workspace_bytes;
  return {};
}

size_t max_workspace_bytes(const Problem& largest, const Device& device) {
  return joined_bytes(largest) + fa::max_workspace_bytes(largest.params, device);
}

Status launch(const Plan& plan, Problem problem, const ExecutionContext& context) {
  if (context.workspace_bytes < plan.workspace_bytes || (plan.workspace_bytes > 0 && context.workspace == nullptr))
    return invalid("the workspace has " + std::to_string(context.workspace_bytes) + " bytes; expected " +
                   std::to_string(plan.workspace_bytes));
  char* joined = static_cast<char*>(context.workspace);
  for (int which = 0; which < 2; ++which) {
    if (!problem.fresh[which].present) continue;
    if (joins_in_workspace(problem, which)) {
      set_present(&problem, which, joined);
      joined += bytes_of(problem.present[which]);
    }
    if (Status s = append_kv(problem.past[which], problem.fresh[which], problem.present[which], plan.attention.device, context);
        !s.ok())
      return s;
  }
  ExecutionContext inner = context;
  inner.workspace = joined;
  inner.workspace_bytes -= plan.joined_bytes;
  return fa::launch(plan.attention, problem.params, inner);
}

}  // namespace fa::plugin
