// SPDX-License-Identifier: Apache-2.0
// The operator's attributes as TensorRT's plugin fields, in both directions; made from attributes.def alone.
// Called by the creator (names, reading) and the plugin (serialising).
#pragma once

#include <NvInferRuntime.h>

#include <vector>

#include "bind.h"

namespace fa::trt {

/// What a plugin is made from: the attributes and, once it is configured, the GPU that it is planned for and the memory that it
/// asked for. An engine carries these along: wherever it runs, it takes no more than it reserved.
struct PluginState {
  plugin::Attributes attributes;
  int64_t planned_compute_capability = 0;   // 0: not configured yet
  int64_t planned_num_sms = 0;              // streaming multiprocessors
  int64_t planned_shared_memory_bytes = 0;  // opt-in limit of one thread block
  int64_t reserved_workspace_bytes = 0;     // for the largest shapes that it was configured for
};

/// Field names and types as the creator lists them: the attributes, which are all that a parser is to pass. Never changes.
const nvinfer1::PluginFieldCollection* attribute_fields();

/// Reads fields of any order, copying what they point to; absent ones keep their default, unknown ones are an error. Integers may
/// be kINT32 or kINT64, strings kCHAR with or without a trailing NUL. The sentence names the field. `phase`: where they come
/// from, a user or a parser (kBUILD), or an engine (kRUNTIME).
Status read_fields(const nvinfer1::PluginFieldCollection* fields, nvinfer1::TensorRTPhase phase, PluginState* state);

/// Fields that read_fields() turns into the same state again. They point into `state`, which must outlive them.
std::vector<nvinfer1::PluginField> write_fields(const PluginState& state);

/// One line "name=value;…" of all attributes: equal for equal attributes, different for different ones.
std::string describe(const plugin::Attributes& attributes);

}  // namespace fa::trt
