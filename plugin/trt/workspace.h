// SPDX-License-Identifier: Apache-2.0
// TensorRT's descriptors bound to problems, and the memory that a whole range of shapes needs. Used by plugin.cpp.
#pragma once

#include <NvInferRuntime.h>

#include "bind.h"

namespace fa::trt {

/// Binds a node's inputs at one corner of their range: &DynamicPluginTensorDesc::min, opt or max. No memory yet.
Status bind_at(const plugin::Node& node, const nvinfer1::DynamicPluginTensorDesc* inputs,
               nvinfer1::Dims nvinfer1::DynamicPluginTensorDesc::* corner, plugin::Problem* problem);

/// Binds a node's inputs at their shapes of now; `data` may be null where only the shapes are looked at.
Status bind_now(const plugin::Node& node, const nvinfer1::PluginTensorDesc* inputs, const void* const* data,
                plugin::Problem* problem);

/// Bytes that suffice for every shape up to the range's max; where the range is one shape, exactly what that shape needs, with
/// the kernel of this name, or if it is null with the kernel for this device and the one for others.
Status reserved_workspace(const plugin::Node& node, const nvinfer1::DynamicPluginTensorDesc* inputs, const Device& device,
                          const char* kernel, size_t* bytes);

}  // namespace fa::trt
