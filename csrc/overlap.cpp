// SPDX-License-Identifier: Apache-2.0
// See overlap.h.
#include "overlap.h"

#include <algorithm>
#include <cstdlib>

namespace fa {
namespace {

/// An axis in bytes: element i of 0 … last lies i * stride behind the first.
struct Axis {
  int64_t stride;  // above 0
  int64_t last;
};

/// The bytes of a tensor: `run` contiguous ones at each place that the axes lead to.
struct Bytes {
  int64_t begin;  // address of the lowest
  int64_t run;    // at least 1
  Axis axes[4];   // from the largest stride to the smallest
  int num_axes;   // axes of size 1 or stride 0 are no axes here
};

Bytes bytes_of(const TensorView& t) {
  Bytes bytes{reinterpret_cast<intptr_t>(t.data), size_of(t.dtype), {}, 0};
  for (int i = 0; i < 4; ++i) {
    if (t.shape[i] <= 1 || t.stride[i] == 0) continue;
    const Axis axis{std::abs(t.stride[i]) * size_of(t.dtype), t.shape[i] - 1};
    if (t.stride[i] < 0) bytes.begin -= axis.last * axis.stride;
    int place = bytes.num_axes++;
    for (; place > 0 && bytes.axes[place - 1].stride < axis.stride; --place) bytes.axes[place] = bytes.axes[place - 1];
    bytes.axes[place] = axis;
  }
  return bytes;
}

/// Makes one run of the runs along inner axes, as long as they leave no gap. Returns whether two of them had a byte in common.
bool join_runs(Bytes* bytes) {
  bool overlapped = false;
  for (; bytes->num_axes > 0; --bytes->num_axes) {
    const Axis& innermost = bytes->axes[bytes->num_axes - 1];
    if (innermost.stride > bytes->run) break;
    overlapped = overlapped || innermost.stride < bytes->run;
    bytes->run += innermost.last * innermost.stride;
  }
  return overlapped;
}

/// What may be added to a distance: stride * x for one whole number x from least to most.
struct Term {
  int64_t stride;  // above 0
  int64_t least, most;
};

int64_t floor_quotient(int64_t a, int64_t b) { return a / b - (a % b < 0); }

/// Is there a sum of all terms, from the largest stride to the smallest, that is from `low` to `high`? Of nested axes at most
/// some multiples of each stride come that near, whatever the sizes. True also when `tries` are used up.
bool has_sum(const Term* terms, int num_terms, int64_t low, int64_t high, int* tries) {
  if (num_terms == 0) return low <= 0 && 0 <= high;
  int64_t least_rest = 0, most_rest = 0;
  for (int i = 1; i < num_terms; ++i)
    least_rest += terms[i].stride * terms[i].least, most_rest += terms[i].stride * terms[i].most;
  const Term& term = terms[0];
  const int64_t first = std::max(term.least, -floor_quotient(most_rest - low, term.stride));
  const int64_t last = std::min(term.most, floor_quotient(high - least_rest, term.stride));
  for (int64_t x = first; x <= last; ++x) {
    if (--*tries < 0) return true;
    if (has_sum(terms + 1, num_terms - 1, low - term.stride * x, high - term.stride * x, tries)) return true;
  }
  return false;
}

constexpr int kTries = 1000;  // some microseconds

/// The differences between places of two tensors: of equal strides, one term.
int difference_terms(const Bytes& a, const Bytes& b, Term (&terms)[8]) {
  int count = 0;
  for (int i = 0, j = 0; i < a.num_axes || j < b.num_axes; ++count) {
    const int64_t a_stride = i < a.num_axes ? a.axes[i].stride : 0, b_stride = j < b.num_axes ? b.axes[j].stride : 0;
    terms[count] = {std::max(a_stride, b_stride), 0, 0};
    if (a_stride == terms[count].stride) terms[count].least -= a.axes[i++].last;
    if (b_stride == terms[count].stride) terms[count].most += b.axes[j++].last;
  }
  return count;
}

}  // namespace

Span span_of(const TensorView& t) {
  Span span{reinterpret_cast<intptr_t>(t.data), reinterpret_cast<intptr_t>(t.data) + size_of(t.dtype)};
  for (int i = 0; i < 4; ++i) {
    if (t.shape[i] > 1) (t.stride[i] < 0 ? span.begin : span.end) += (t.shape[i] - 1) * t.stride[i] * size_of(t.dtype);
  }
  return span;
}

bool overlap(const TensorView& a, const TensorView& b) {
  if (a.empty() || b.empty()) return false;
  const Span a_span = span_of(a), b_span = span_of(b);
  if (a_span.end <= b_span.begin || b_span.end <= a_span.begin) return false;
  Bytes left = bytes_of(a), right = bytes_of(b);
  join_runs(&left);
  join_runs(&right);
  Term terms[8];
  const int count = difference_terms(left, right, terms);
  const int64_t distance = right.begin - left.begin;
  int tries = kTries;
  return has_sum(terms, count, 1 - right.run - distance, left.run - 1 - distance, &tries);
}

bool overlaps_itself(const TensorView& t) {
  if (t.empty()) return false;
  Bytes bytes = bytes_of(t);
  if (join_runs(&bytes)) return true;
  int tries = kTries;
  Term terms[4];
  int64_t inner = bytes.run;  // extent of the axes further in
  for (int i = bytes.num_axes; i-- > 0; inner += bytes.axes[i].last * bytes.axes[i].stride) {
    terms[i] = {bytes.axes[i].stride, 1, bytes.axes[i].last};  // two elements that differ on this axis, and further in if at all
    const int num_terms = bytes.num_axes - i;
    if (terms[i].stride < inner && has_sum(terms + i, num_terms, 1 - bytes.run, bytes.run - 1, &tries)) return true;
    terms[i].least = -terms[i].most;
  }
  return false;
}

}  // namespace fa
