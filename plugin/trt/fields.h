// SPDX-License-Identifier: Apache-2.0
// The operator's attributes as TensorRT's plugin fields, in both directions; made from attributes.def alone.
// Called by the creator (names, reading) and the plugin (serialising).
#pragma once

#include <NvInferRuntime.h>

#include <vector>

#include "bind.h"

namespace fa::trt {

/// What a plugin is made from: the attributes, and the GPU that its workspace was planned for.
struct PluginState {
  plugin::Attributes attributes;
  int64_t planned_num_sms = 0;  // streaming multiprocessors of the GPU that the engine was built on; 0: not built yet
};

/// Field names and types as the creator lists them: the attributes, which are all that a parser is to pass. Never changes.
const nvinfer1::PluginFieldCollection* attribute_fields();

/// Reads fields of any order, copying what they point to; absent ones keep their default, unknown ones are ignored.
/// Integers may be kINT32 or kINT64, strings kCHAR with or without a trailing NUL. The sentence names the field.
Status read_fields(const nvinfer1::PluginFieldCollection* fields, PluginState* state);

/// Fields that read_fields() turns into the same state again. They point into `state`, which must outlive them.
std::vector<nvinfer1::PluginField> write_fields(const PluginState& state);

/// One line "name=value;…" of all attributes: equal for equal attributes, different for different ones.
std::string describe(const plugin::Attributes& attributes);

}  // namespace fa::trt
