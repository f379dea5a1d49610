// SPDX-License-Identifier: Apache-2.0
// From what Python hands over (api.h) to a plain Tensor, without a copy. Used by bound_call.cpp.
#pragma once

#include <stdexcept>
#include <string>

#include "api.h"
#include "bind.h"

namespace fa::plugin {

/// Raised as one of Python's exceptions.
struct Error : std::runtime_error {
  Error(FaError raised, const std::string& sentence) : std::runtime_error(sentence), kind(raised) {}
  FaError kind;
};

struct Array {
  Tensor tensor;
  DeviceType device = DeviceType::kCpu;
  int device_id = 0;
  bool is_spec = false;    // no memory
  bool read_only = false;  // known of NumPy arrays only; others don't export such memory
};

/// Throws what isn't ok.
void check(const Status& status);

/// Throws an Error with `name` in the sentence.
Array array_from(const char* name, const FaArray& given);

}  // namespace fa::plugin
