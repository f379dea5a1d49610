// SPDX-License-Identifier: Apache-2.0
// Tensors of a call to StepParams: strides for layouts and broadcasts, the diagonal, the cache (bind.h). What can only be
// wrong because of a convention is refused here; the rest is fa::validate's.
#include "bind.h"

#include <algorithm>
#include <cmath>

#include "output_shape.h"

namespace fa::plugin {
namespace {

Status wrong_shape(Input input, const Tensor& tensor, const std::string& expected) {
  return invalid(std::string(name_of(input)) + " has shape " + shape_text(tensor.shape, tensor.rank) + "; expected " + expected);
}

struct Numbers {
  static int64_t constant(int64_t value) { return value; }
  static int64_t sum(int64_t a, int64_t b) { return a + b; }
  static int64_t larger(int64_t a, int64_t b) { return std::max(a, b); }
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
    if (Status s = bind_transform(); !s.ok()) return s;
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
    if (Status s = check_num_inputs(node_, inputs_.size()); !s.ok()) return s;
    for (size_t i = 0; i < inputs_.size(); ++i) {
      const Input input = node_.inputs[i];
      if (Status s = check_dtype(input, inputs_[i].dtype, inputs_[0].dtype); !s.ok()) return s;
      if (inputs_[i].rank > 4 && input != Input::kUnused)
        return invalid(std::string(name_of(input)) + " has rank " + std::to_string(inputs_[i].rank) + "; expected 4 at most");
      if (exceeds_memory(inputs_[i].shape)) return wrong_shape(input, inputs_[i], "a tensor that fits a memory");
    }
    return check_output_dtype(node_, inputs_[0].dtype);
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

  DType cache_dtype() const {
    const Tensor* past = find(Input::kPastKey);
    return past ? past->dtype : params_.query.dtype;
  }

  /// A row-major tensor of the shape that the output has, or would have.
  Tensor tensor_of(Output output) const {
    const auto shape_of = [&](int slot) {
      const Tensor& t = inputs_[slot];
      return Shape<int64_t>{t.rank, {t.shape[0], t.shape[1], t.shape[2], t.shape[3]}};
    };
    Numbers numbers;
    const Shape<int64_t> shape = output_shape<int64_t>(node_, output, shape_of, layouts_, numbers);
    return contiguous(nullptr, dtype_of(node_, output, params_.query.dtype, cache_dtype()), shape.dims, shape.rank);
  }

  void make_outputs() {
    for (const Output output : node_.outputs) problem_.outputs[static_cast<int>(output)] = tensor_of(output);
    const Tensor& out = problem_.outputs[0];
    params_.out = view_BHSD(out, layouts_.output, params_.query.shape[1], params_.value.shape[3], 0, params_.value.shape[3]);
    const Tensor& lse = problem_.outputs[static_cast<int>(Output::kLse)];
    if (lse.rank > 0) params_.lse = view_of(lse);
  }

  bool is_paged() const { return node_.words.cache == CacheMode::kPaged; }

  /// A past or present as [B, H, S, columns], of pages [blocks, H, rows, columns]. `fresh`: the new rows that go there.
  TensorView view_of_cache(const Tensor& t, const TensorView& fresh) const {
    const int64_t columns = attributes_.kv_cache_bit_width == 4 ? (fresh.shape[3] + 1) / 2 : fresh.shape[3];
    return view_BHSD(t, is_paged() ? Layout::kBSHD : layouts_.cache, fresh.shape[1], columns, 0, columns);
  }

  Status check_past(Input input, const Tensor& past, const TensorView& fresh) const {
    const bool is_flat = layouts_.cache == Layout::kBSH && !is_paged(), packs = attributes_.kv_cache_bit_width == 4;
    const int64_t columns = packs ? (fresh.shape[3] + 1) / 2 : fresh.shape[3];
    if ((past.dtype == DType::kUInt8) != packs)
      return invalid(std::string(name_of(input)) + " is " + name_of(past.dtype) + " and kv_cache_bit_width " +
                     std::to_string(attributes_.kv_cache_bit_width) + "; expected uint8 with 4, and another dtype with 8");
    const bool has_rank = past.rank == (is_flat ? 3 : 4) && (!is_flat || past.shape[2] == fresh.shape[1] * columns);
    const TensorView view = has_rank ? view_of_cache(past, fresh) : TensorView{};
    if (has_rank && (is_paged() || view.shape[0] == fresh.shape[0]) && view.shape[1] == fresh.shape[1] &&
        view.shape[3] == columns)
      return {};
    const std::string head_dim = (packs ? "bytes " : "head_dim ") + std::to_string(columns);
    const std::string heads = "heads " + std::to_string(fresh.shape[1]), batch = "batch " + std::to_string(fresh.shape[0]);
    const std::string as = std::string(", as ") + name_of(input == Input::kPastKey ? Input::kKey : Input::kValue) + " has them";
    if (is_paged())
      return wrong_shape(input, past, "[any number of blocks, rows of a block, " + heads + ", " + head_dim + "]" + as);
    if (is_flat) return wrong_shape(input, past, "[" + batch + ", any number of rows, heads * " + head_dim + "]" + as);
    if (layouts_.cache == Layout::kBSHD)
      return wrong_shape(input, past, "[" + batch + ", any number of rows, " + heads + ", " + head_dim + "]" + as);
    return wrong_shape(input, past, "[" + batch + ", " + heads + ", any number of rows, " + head_dim + "]" + as);
  }

  /// One of keys (0) and values (1): what is stored where, and what attention then reads.
  Status store(int which, Input input, Output output, TensorView* view) {
    const Tensor* past = find(input);
    const bool is_wanted = node_.slot(output) >= 0;
    const TensorView fresh = *view;
    if (past)
      if (Status s = check_past(input, *past, fresh); !s.ok()) return s;
    if (!past && (which == 1 || !transforms_keys())) {
      if (is_wanted) problem_.fresh[which] = fresh, problem_.present[which] = view_of_cache(tensor_of(output), fresh);
      return {};
    }
    CacheParams& cache = params_.cache;
    (which == 0 ? cache.new_key : cache.new_value) = fresh;
    if (past) (which == 0 ? cache.past_key : cache.past_value) = view_of_cache(*past, fresh);
    *view = view_of_cache(is_paged() ? *past : tensor_of(output), fresh);  // pages stay where they are, with their strides
    problem_.in_workspace[which] = !is_wanted && !is_paged();
    if (cache.mode != CacheMode::kWindow || fresh.shape[2] <= 1) return {};
    if (is_wanted) (which == 0 ? cache.present_key : cache.present_value) = *view;
    const int64_t stage[4] = {view->shape[0], view->shape[1], view->shape[2] + fresh.shape[2], view->shape[3]};
    *view = view_of(contiguous(nullptr, view->dtype, stage, 4));
    problem_.in_workspace[which] = true;
    return {};
  }

  bool transforms_keys() const { return params_.norm.key_weight.present || params_.rotary.cos.present; }

  Status bind_cache() {
    params_.cache.mode = node_.words.cache;
    if (Status s = store(0, Input::kPastKey, Output::kPresentKey, &params_.key); !s.ok()) return s;
    if (Status s = store(1, Input::kPastValue, Output::kPresentValue, &params_.value); !s.ok()) return s;
    const CacheParams& cache = params_.cache;
    if (cache.past_key.present && cache.past_key.shape[2] != cache.past_value.shape[2])
      return wrong_shape(Input::kPastValue, *find(Input::kPastValue),
                         std::to_string(cache.past_key.shape[2]) + " rows, as past_key has them");
    if (Status s = bind_scale(Input::kKScale, params_.key, params_.query.shape[3], &params_.cache.key_scale); !s.ok()) return s;
    return bind_scale(Input::kVScale, params_.value, params_.out.shape[3], &params_.cache.value_scale);
  }

  /// A scale for all, or one for each head and column: [H_kv, columns], with axes of size 1 anywhere before the last.
  Status bind_scale(Input input, const TensorView& cache, int64_t columns, TensorView* view) const {
    const Tensor* t = find(input);
    if (!t) return {};
    const int64_t heads = cache.shape[1], last = t->rank > 0 ? t->shape[t->rank - 1] : 1;
    int64_t count = 1, head_stride = 0;
    for (int i = 0; i < t->rank; ++i) count *= t->shape[i];
    for (int i = 0; i + 1 < t->rank; ++i)
      if (t->shape[i] == heads && heads > 1) head_stride = t->stride[i];
    if (count != 1 && (count != heads * columns || last != columns || (heads > 1 && head_stride == 0)))
      return wrong_shape(input, *t,
                         "[1] or [kv heads " + std::to_string(heads) + ", head_dim " + std::to_string(columns) +
                             "], with axes of size 1 before the last");
    const int64_t shape[2] = {heads, columns}, stride[2] = {head_stride, count == 1 ? 0 : t->stride[t->rank - 1]};
    view->data = t->data, view->dtype = t->dtype, view->present = true;
    std::copy(shape, shape + 2, view->shape);
    std::copy(stride, stride + 2, view->stride);
    return {};
  }

  /// cos_cache or sin_cache: [positions, columns], or [batch or 1, rows of query, columns].
  Status bind_angles(Input input, TensorView* view) const {
    const Tensor* t = find(input);
    if (!t) return {};
    const int64_t columns = attributes_.rotary_dim / 2, batch = params_.query.shape[0], rows = params_.query.shape[2];
    if ((t->rank != 2 && t->rank != 3) || t->shape[t->rank - 1] < columns)
      return wrong_shape(input, *t, "[positions, rotary_dim / 2] or [batch, rows of query, rotary_dim / 2]");
    if (t->rank == 3 && ((t->shape[0] != batch && t->shape[0] != 1) || t->shape[1] != rows))
      return wrong_shape(input, *t,
                         "[positions, rotary_dim / 2] or [batch " + std::to_string(batch) + ", rows of query " +
                             std::to_string(rows) + ", rotary_dim / 2]");
    *view = view_of(*t);
    if (t->rank == 3 && t->shape[0] == 1) view->stride[0] = 0, view->shape[0] = batch;
    if (columns > 0) view->shape[t->rank - 1] = columns;
    return {};
  }

  /// The rotary embedding and the norms of queries and new keys.
  Status bind_transform() {
    RotaryParams& rotary = params_.rotary;
    if (Status s = bind_angles(Input::kCosCache, &rotary.cos); !s.ok()) return s;
    if (Status s = bind_angles(Input::kSinCache, &rotary.sin); !s.ok()) return s;
    const Tensor *cos = find(Input::kCosCache), *sin = find(Input::kSinCache), *ids = find(Input::kPositionIds);
    if (cos && cos->rank != sin->rank)
      return wrong_shape(Input::kSinCache, *sin, "rank " + std::to_string(cos->rank) + ", as cos_cache has");
    rotary.by_row = cos && cos->rank == 3;
    rotary.interleaved = attributes_.rotary_interleaved != 0;
    if (ids) {
      const int64_t batch = params_.query.shape[0], rows = params_.query.shape[2];
      if (ids->rank != 2 || (ids->shape[0] != batch && ids->shape[0] != 1) || ids->shape[1] != rows)
        return wrong_shape(Input::kPositionIds, *ids,
                           "[1 or batch " + std::to_string(batch) + ", rows of query " + std::to_string(rows) + "]");
      rotary.position_ids = view_of(*ids);
      if (ids->shape[0] == 1) rotary.position_ids.stride[0] = 0, rotary.position_ids.shape[0] = batch;
    }
    NormParams& norm = params_.norm;
    norm.query_epsilon = attributes_.q_norm_epsilon;
    norm.key_epsilon = attributes_.k_norm_epsilon;
    const int64_t columns = params_.query.shape[3];
    if (Status s = bind_vector(Input::kQNormWeight, columns, "head_dim", false, &norm.query_weight); !s.ok()) return s;
    return bind_vector(Input::kKNormWeight, columns, "head_dim", false, &norm.key_weight);
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
    if (Status s = bind_vector(Input::kQueryOffset, num_sequences_, "batch", true, &params_.query_offsets); !s.ok()) return s;
    CacheParams& cache = params_.cache;
    if (Status s = bind_vector(Input::kWriteIndices, num_sequences_, "batch", false, &cache.write_indices); !s.ok()) return s;
    const int64_t new_rows = cache.new_key.shape[2];
    if (Status s = bind_vector(Input::kSlotMapping, new_rows, "rows of key", false, &cache.slot_mapping); !s.ok()) return s;
    const Tensor* table = find(Input::kBlockTable);
    if (!table) return {};
    if (table->rank != 2 || table->shape[0] != num_sequences_)
      return wrong_shape(Input::kBlockTable, *table, "[sequences " + std::to_string(num_sequences_) + ", blocks of a sequence]");
    cache.block_table = view_of(*table);
    return {};
  }

  /// Broadcasts a mask or bias from the right to [B, H_q, S_q, S_kv].
  Status bind_mask(Input input, TensorView* view) const {
    const Tensor* t = find(input);
    if (!t) return {};
    // The rows of a windowed cache are not all positions that there have been, which the columns of a mask count.
    const bool counts_positions = node_.words.cache == CacheMode::kWindow;
    int64_t keys = params_.key.shape[2];
    if (counts_positions && t->rank > 0)
      keys = t->shape[t->rank - 1] == 1 ? kMostElements : t->shape[t->rank - 1];  // one column stands for all positions
    const int64_t target[4] = {params_.query.shape[0], params_.query.shape[1], params_.query.shape[2], keys};
    const auto refuse = [&] {
      return wrong_shape(input, *t,
                         "something that broadcasts to [batch " + std::to_string(target[0]) + ", heads " +
                             std::to_string(target[1]) + ", query rows " + std::to_string(target[2]) +
                             (counts_positions ? ", any number of positions" : ", keys " + std::to_string(target[3])) +
                             "], rank 1 to 4");
    };
    if (t->rank < 1) return refuse();
    view->data = t->data;
    view->dtype = t->dtype;
    view->present = true;
    for (int axis = 0; axis < 4; ++axis) {
      const int from = axis - (4 - t->rank);
      const int64_t size = from < 0 ? 1 : t->shape[from];
      const bool shorter = axis == 3 && size < target[3] && size != 1;  // masks the keys beyond
      if (size != target[axis] && size != 1 && !shorter) return refuse();
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
    if (Status s = bind_descales(); !s.ok()) return s;
    if (Status s = bind_head_rows(Input::kQueryBias, params_.query.shape[3], &params_.query_bias); !s.ok()) return s;
    if (Status s = bind_head_rows(Input::kEmptyRowValue, params_.out.shape[3], &params_.empty_row_value); !s.ok()) return s;
    return bind_vector(Input::kSinks, heads, "heads", false, &params_.sinks);
  }

  /// A row of `columns` elements for each query head.
  Status bind_head_rows(Input input, int64_t columns, TensorView* view) const {
    const Tensor* t = find(input);
    if (!t) return {};
    const int64_t heads = params_.query.shape[1];
    if (t->rank != 2 || t->shape[0] != heads || t->shape[1] != columns)
      return wrong_shape(input, *t, "[heads " + std::to_string(heads) + ", head_dim " + std::to_string(columns) + "]");
    *view = view_of(*t);
    return {};
  }

  /// The factors of float8 tensors as [B, heads].
  Status bind_descales() {
    const int64_t heads = params_.query.shape[1], heads_kv = params_.key.shape[1];
    if (Status s = bind_factors(Input::kQueryDescale, heads, &params_.query_descale); !s.ok()) return s;
    if (Status s = bind_factors(Input::kKeyDescale, heads_kv, &params_.key_descale); !s.ok()) return s;
    if (Status s = bind_factors(Input::kValueDescale, heads_kv, &params_.value_descale); !s.ok()) return s;
    return bind_factors(Input::kOutputScale, heads, &params_.output_scale);
  }

  /// One factor for all, one for each head, or one for each sequence and head.
  Status bind_factors(Input input, int64_t heads, TensorView* view) const {
    const Tensor* t = find(input);
    if (!t) return {};
    const bool is_one = t->rank == 0 || (t->rank == 1 && t->shape[0] == 1), is_shared = t->rank == 1 && t->shape[0] == heads;
    if (!is_one && !is_shared && (t->rank != 2 || t->shape[0] != num_sequences_ || t->shape[1] != heads))
      return wrong_shape(input, *t,
                         "[], [1], [heads " + std::to_string(heads) + "] or [batch " + std::to_string(num_sequences_) +
                             ", heads " + std::to_string(heads) + "]");
    *view = view_of(*t);
    view->shape[0] = num_sequences_;
    view->shape[1] = heads;
    view->stride[1] = is_one ? 0 : t->stride[t->rank - 1];
    if (t->rank < 2) view->stride[0] = 0;
    return {};
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
    const Words& words = node_.words;
    params_.empty_row = words.empty_rows_are_means        ? EmptyRow::kMean
                        : params_.empty_row_value.present ? EmptyRow::kValue
                                                          : EmptyRow::kZero;
    params_.float32_precision = words.float32_precision;
    const CacheParams& cache = params_.cache;
    const bool counts_back = words.alignment == Alignment::kOnnx && params_.kv_lengths.present && !cache.past_key.present;
    params_.align_bottom_right = words.alignment == Alignment::kBottomRight || counts_back;
    if (!params_.align_bottom_right && cache.mode == CacheMode::kAppend && cache.past_key.present)
      params_.query_offset = cache.past_key.shape[2];
  }

  const Node& node_;
  const Attributes& attributes_;
  const std::vector<Tensor>& inputs_;
  Problem& problem_;
  StepParams& params_;
  Layouts layouts_{};
  int64_t num_sequences_ = 0;
};

}  // namespace

Status bind(const Node& node, const std::vector<Tensor>& inputs, Problem* problem) {
  return Binder(node, inputs, problem).bind();
}

}  // namespace fa::plugin
