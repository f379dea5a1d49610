// SPDX-License-Identifier: Apache-2.0
// TensorRT's tensors in the operator's words. Used by plugin.cpp and workspace.cpp.
#pragma once

#include <NvInferRuntime.h>

#include <string>

#include "bind.h"

namespace fa::trt {

/// False for a type that no input or output of the operator has.
inline bool to_dtype(nvinfer1::DataType type, DType* dtype) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT:
      *dtype = DType::kFloat32;
      return true;
    case nvinfer1::DataType::kHALF:
      *dtype = DType::kFloat16;
      return true;
    case nvinfer1::DataType::kBF16:
      *dtype = DType::kBFloat16;
      return true;
    case nvinfer1::DataType::kBOOL:
      *dtype = DType::kBool;
      return true;
    case nvinfer1::DataType::kINT32:
      *dtype = DType::kInt32;
      return true;
    case nvinfer1::DataType::kINT64:
      *dtype = DType::kInt64;
      return true;
    case nvinfer1::DataType::kINT8:
      *dtype = DType::kInt8;
      return true;
    case nvinfer1::DataType::kUINT8:
      *dtype = DType::kUInt8;
      return true;
    case nvinfer1::DataType::kFP8:
      *dtype = DType::kFloat8E4M3;
      return true;
    default:
      return false;
  }
}

inline nvinfer1::DataType to_data_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return nvinfer1::DataType::kFLOAT;
    case DType::kFloat16:
      return nvinfer1::DataType::kHALF;
    case DType::kBFloat16:
      return nvinfer1::DataType::kBF16;
    case DType::kBool:
      return nvinfer1::DataType::kBOOL;
    case DType::kInt32:
      return nvinfer1::DataType::kINT32;
    case DType::kInt64:
      return nvinfer1::DataType::kINT64;
    case DType::kInt8:
      return nvinfer1::DataType::kINT8;
    case DType::kUInt8:
      return nvinfer1::DataType::kUINT8;
    case DType::kFloat8E4M3:
      return nvinfer1::DataType::kFP8;
  }
  return nvinfer1::DataType::kFLOAT;
}

/// A row-major tensor of `dims` (all known). The sentence names the input.
inline Status to_tensor(void* data, nvinfer1::DataType type, const nvinfer1::Dims& dims, plugin::Input input,
                        plugin::Tensor* tensor) {
  const std::string name = plugin::name_of(input);
  DType dtype;
  if (!to_dtype(type, &dtype)) {
    return {StatusCode::kInvalidArgument,
            name + " has TensorRT data type " + std::to_string(static_cast<int>(type)) + ", which the operator takes nowhere"};
  }
  if (dims.nbDims < 0) return {StatusCode::kInvalidArgument, name + " has an unknown rank"};
  for (int32_t i = 0; i < dims.nbDims; ++i) {
    if (dims.d[i] < 0) return {StatusCode::kInvalidArgument, name + ": dimension " + std::to_string(i) + " is unknown"};
  }
  *tensor = plugin::contiguous(data, dtype, dims.d, static_cast<size_t>(dims.nbDims));
  return {};
}

}  // namespace fa::trt
