// SPDX-License-Identifier: Apache-2.0
// From a Python array to a plain Tensor, without a copy: NumPy arrays (bfloat16 of ml_dtypes too), anything with __dlpack__, or a
// pair (shape, dtype name) where only a plan is made. Used by bindings.cpp.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind.h"

namespace fa::plugin {

struct Array {
  Tensor tensor;
  DeviceType device = DeviceType::kCpu;
  int device_id = 0;
  bool is_spec = false;    // no memory
  bool read_only = false;  // known of NumPy arrays only; others don't export such memory
  pybind11::object owner;  // keeps the memory alive
};

/// Raises TypeError or ValueError with `name` in the sentence. `stream`: a CUDA stream on which the data is to be ready.
Array array_from(const char* name, const pybind11::handle& object, uintptr_t stream);

/// By name, as NumPy and PyTorch write it; raises TypeError where the operator has no such dtype.
DType dtype_from(const char* tensor_name, const std::string& dtype_name);

}  // namespace fa::plugin
