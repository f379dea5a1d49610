// SPDX-License-Identifier: Apache-2.0
// TensorRT's tensors in the operator's words. Used by plugin.cpp and workspace.cpp.
#pragma once

#include <NvInferRuntime.h>

#include <iterator>
#include <optional>
#include <string>

#include "bind.h"

namespace fa::trt {

struct DataTypeOfDType {
  nvinfer1::DataType type;
  DType dtype;
};
inline constexpr DataTypeOfDType kDataTypes[] = {
    {nvinfer1::DataType::kFLOAT, DType::kFloat32}, {nvinfer1::DataType::kHALF, DType::kFloat16},
    {nvinfer1::DataType::kBF16, DType::kBFloat16}, {nvinfer1::DataType::kBOOL, DType::kBool},
    {nvinfer1::DataType::kINT32, DType::kInt32},   {nvinfer1::DataType::kINT64, DType::kInt64},
    {nvinfer1::DataType::kINT8, DType::kInt8},     {nvinfer1::DataType::kUINT8, DType::kUInt8},
    {nvinfer1::DataType::kFP8, DType::kFloat8E4M3}};
static_assert(std::size(kDataTypes) == kNumDTypes);

/// Nothing for a type that no input or output of the operator has.
inline std::optional<DType> to_dtype(nvinfer1::DataType type) {
  for (const DataTypeOfDType& known : kDataTypes)
    if (known.type == type) return known.dtype;
  return std::nullopt;
}

inline nvinfer1::DataType to_data_type(DType dtype) {
  for (const DataTypeOfDType& known : kDataTypes)
    if (known.dtype == dtype) return known.type;
  return nvinfer1::DataType::kFLOAT;
}

/// A row-major tensor of `dims` (all known). The sentence names the input.
inline Status to_tensor(void* data, nvinfer1::DataType type, const nvinfer1::Dims& dims, plugin::Input input,
                        plugin::Tensor* tensor) {
  const std::string name = plugin::name_of(input);
  const std::optional<DType> dtype = to_dtype(type);
  if (!dtype)
    return plugin::invalid(name + " has TensorRT data type " + std::to_string(static_cast<int>(type)) +
                           ", which the operator takes nowhere");
  if (dims.nbDims < 0) return plugin::invalid(name + " has an unknown rank");
  for (int32_t i = 0; i < dims.nbDims; ++i) {
    if (dims.d[i] < 0) return plugin::invalid(name + ": dimension " + std::to_string(i) + " is unknown");
  }
  *tensor = plugin::contiguous(data, *dtype, dims.d, static_cast<size_t>(dims.nbDims));
  return {};
}

}  // namespace fa::trt
