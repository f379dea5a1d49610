// SPDX-License-Identifier: Apache-2.0
// Shapes of the outputs, once for numbers (bind.cpp), for ONNX Runtime's symbols and for TensorRT's expressions: a template over
// the kind of dimension. An Algebra has constant(int64_t), sum(a, b), larger(a, b), product(a, b) and quotient(a, b) (exact
// division).
#pragma once

#include "bind.h"

namespace fa::plugin {

/// The layouts of query, key, value and output, from attributes and ranks; a Status where they contradict each other. Past and
/// present have the cache's, which pages have not: they are [blocks, rows of a block, H_kv, D].
struct Layouts {
  Layout query, key, value, output, cache;
};
Status resolve_layouts(const Node& node, int query_rank, int key_rank, int value_rank, Layouts* layouts);

template <class Dim>
struct Shape {
  int rank = 0;
  Dim dims[4] = {};
};

/// Sizes of one operand [B, H, S, D], whatever its layout. heads, head_dim: attributes, 0 = read from the shape.
template <class Dim, class Algebra>
Shape<Dim> sizes_BHSD(const Shape<Dim>& shape, Layout layout, int64_t heads, int64_t head_dim, Algebra& algebra) {
  const Dim* d = shape.dims;
  if (layout == Layout::kBHSD) return {4, {d[0], d[1], d[2], d[3]}};
  if (layout == Layout::kBSHD) return {4, {d[0], d[2], d[1], d[3]}};
  const Dim h = algebra.constant(heads);
  return {4, {d[0], h, d[1], head_dim > 0 ? algebra.constant(head_dim) : algebra.quotient(d[2], h)}};
}

/// Rows of a present: those of past and new ones, or the capacity of a cache that they are written to.
template <class Dim, class ShapeOf, class Algebra>
Dim present_rows(const Node& node, const Shape<Dim>* past, const Dim& fresh, const ShapeOf& shape_of, Layout layout,
                 Algebra& algebra) {
  if (past == nullptr) return fresh;
  const Dim& rows = past->dims[layout == Layout::kBHSD ? 2 : 1];
  if (node.words.cache == CacheMode::kAppend) return algebra.sum(rows, fresh);
  const int slot = node.slot(Input::kKvExtent);
  if (slot < 0) return rows;
  const Shape<Dim> extent = shape_of(slot);
  return extent.rank > 0 ? algebra.larger(rows, extent.dims[extent.rank - 1]) : Dim{};
}

/// The shape of one output; shape_of(slot) is the Shape<Dim> of an input. Ranks must have passed resolve_layouts.
template <class Dim, class ShapeOf, class Algebra>
Shape<Dim> output_shape(const Node& node, Output output, const ShapeOf& shape_of, const Layouts& layouts, Algebra& algebra) {
  const Attributes& a = node.attributes;
  const int64_t head_dim = a.packed_columns.empty() ? 0 : a.head_dim;
  const int64_t head_dim_v = a.packed_columns.empty() ? 0 : (a.head_dim_v > 0 ? a.head_dim_v : a.head_dim);
  const Shape<Dim> q = sizes_BHSD(shape_of(0), layouts.query, a.q_num_heads, head_dim, algebra);
  const Shape<Dim> k = sizes_BHSD(shape_of(1), layouts.key, a.kv_num_heads, head_dim, algebra);
  const Shape<Dim> v = sizes_BHSD(shape_of(2), layouts.value, a.kv_num_heads, head_dim_v, algebra);
  if (output == Output::kLse) return {3, {q.dims[0], q.dims[1], q.dims[2]}};
  if (output == Output::kOutput) {
    if (layouts.output == Layout::kBHSD) return {4, {q.dims[0], q.dims[1], q.dims[2], v.dims[3]}};
    if (layouts.output == Layout::kBSHD) return {4, {q.dims[0], q.dims[2], q.dims[1], v.dims[3]}};
    return {3, {q.dims[0], q.dims[2], algebra.product(q.dims[1], v.dims[3])}};
  }
  const Shape<Dim>& fresh = output == Output::kPresentKey ? k : v;
  const int slot = node.slot(output == Output::kPresentKey ? Input::kPastKey : Input::kPastValue);
  const Shape<Dim> kept = slot < 0 ? Shape<Dim>{} : shape_of(slot);
  const Shape<Dim>* past = slot < 0 ? nullptr : &kept;
  if (node.words.cache == CacheMode::kPaged && past != nullptr)
    return {4, {past->dims[0], past->dims[1], past->dims[2], past->dims[3]}};
  const Dim rows = present_rows(node, past, fresh.dims[2], shape_of, layouts.cache, algebra);
  const bool packs = a.kv_cache_bit_width == 4 && past != nullptr;  // two numbers in an element: only the past knows
  if (layouts.cache == Layout::kBSH) {
    return {3, {fresh.dims[0], rows, packs ? past->dims[2] : algebra.product(fresh.dims[1], fresh.dims[3])}};
  }
  const Dim columns = packs ? past->dims[3] : fresh.dims[3];
  if (layouts.cache == Layout::kBSHD) return {4, {fresh.dims[0], rows, fresh.dims[1], columns}};
  return {4, {fresh.dims[0], fresh.dims[1], rows, columns}};
}

}  // namespace fa::plugin
