// SPDX-License-Identifier: Apache-2.0
// Do strided tensors have memory in common? Answered byte by byte, not by the first and the last: views of one array may lie
// between one another's rows. Called by rules.h and memory.cpp.
#pragma once

#include "fa/attention.h"

namespace fa {

/// From the lowest byte of an element to behind the highest; without elements nothing means anything.
struct Span {
  intptr_t begin, end;
};
Span span_of(const TensorView& t);

/// Is there a byte of an element of both? Of an empty tensor there is none. True also where that is too long to find out, which
/// no layout of nested axes is.
bool overlap(const TensorView& a, const TensorView& b);

/// Do two elements have a byte in common, an axis of stride 0 being one element? True also where that is too long to find out.
bool overlaps_itself(const TensorView& t);

}  // namespace fa
