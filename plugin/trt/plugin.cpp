// SPDX-License-Identifier: Apache-2.0
// The plugin's methods: TensorRT's descriptors into the tensors of bind.h, statuses into return codes and a line on the log. All
// shape and convention logic is bind.h's and output_shape.h's. Nothing is thrown to TensorRT.
#include "plugin.h"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <memory>
#include <optional>
#include <utility>

#include "output_shape.h"
#include "planned_device.h"
#include "types.h"
#include "workspace.h"

namespace fa::trt {
namespace {

using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IDimensionExpr;
using nvinfer1::PluginTensorDesc;

using plugin::invalid;

constexpr int32_t kSuccess = 0;
constexpr int32_t kFailure = -1;  // TensorRT asks for no more than non-zero

/// A workspace that no GPU has: getWorkspaceSize can tell of an error by nothing else. TensorRT then finds no implementation of
/// the node, where an engine with too little would be made of a smaller number.
constexpr size_t kImpossibleBytes = size_t{1} << 60;

/// output_shape.h's arithmetic on TensorRT's symbolic dimensions. A missing operand, of an input of too low a rank, gives null.
struct ExpressionAlgebra {
  using Dim = const IDimensionExpr*;
  nvinfer1::IExprBuilder& builder;

  Dim constant(int64_t value) { return builder.constant(value); }
  Dim sum(Dim a, Dim b) { return operation(nvinfer1::DimensionOperation::kSUM, a, b); }
  Dim larger(Dim a, Dim b) { return operation(nvinfer1::DimensionOperation::kMAX, a, b); }
  Dim product(Dim a, Dim b) { return operation(nvinfer1::DimensionOperation::kPROD, a, b); }
  Dim quotient(Dim a, Dim b) { return operation(nvinfer1::DimensionOperation::kFLOOR_DIV, a, b); }
  Dim operation(nvinfer1::DimensionOperation op, Dim a, Dim b) { return a && b ? builder.operation(op, *a, *b) : nullptr; }
};

Status write_shape(const plugin::Shape<const IDimensionExpr*>& shape, plugin::Output output, DimsExprs* dims) {
  dims->nbDims = shape.rank;
  for (int i = 0; i < shape.rank; ++i) {
    if (!shape.dims[i])
      return invalid(std::string("the shape of ") + plugin::name_of(output) + " can't be told: an input's rank is wrong");
    dims->d[i] = shape.dims[i];
  }
  return {};
}

/// The current GPU. kUnsupported where there is none.
Status find_device(Device* device) {
  int ordinal = 0;
  if (Status status = current_cuda_device(&ordinal); !status.ok()) return status;
  return query_cuda_device(ordinal, device);
}

}  // namespace

void log_error(const std::string& node_name, const std::string& sentence) noexcept {
  std::fprintf(stderr, "[faplugin] %s '%s': %s\n", kPluginName, node_name.c_str(), sentence.c_str());
}

template <class Body>
int32_t FlashAttentionPlugin::guarded(const char* method, Body body) const noexcept {
  try {
    const Status status = body();
    if (status.ok()) return kSuccess;
    log_error(node_name_, std::string(method) + ": " + status.sentence);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "[faplugin] %s %s: %s\n", kPluginName, method, error.what());
  }
  return kFailure;
}

FlashAttentionPlugin::FlashAttentionPlugin(std::string node_name, plugin::Node node, PluginState state)
    : node_name_(std::move(node_name)),
      node_(std::move(node)),
      state_(std::move(state)),
      description_(describe(state_.attributes)) {}

nvinfer1::IPluginCapability* FlashAttentionPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {  // static_cast: each base stands at an offset of its own
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* FlashAttentionPlugin::clone() noexcept {
  std::unique_ptr<FlashAttentionPlugin> copy;
  guarded("clone", [&]() -> Status {
    copy = std::make_unique<FlashAttentionPlugin>(node_name_, node_, state_);
    copy->tactic_ = tactic_;
    return {};
  });
  return copy.release();
}

Status FlashAttentionPlugin::check_counts(int32_t num_inputs, int32_t num_outputs) const {
  if (Status status = plugin::check_num_inputs(node_, static_cast<size_t>(num_inputs)); !status.ok()) return status;
  if (num_outputs != static_cast<int32_t>(node_.outputs.size())) {
    return invalid("the node has " + std::to_string(num_outputs) + " outputs; expected " + std::to_string(node_.outputs.size()) +
                   ": output and what optional_outputs names");
  }
  return {};
}

int32_t FlashAttentionPlugin::getOutputDataTypes(nvinfer1::DataType* output_types, int32_t num_outputs,
                                                 const nvinfer1::DataType* input_types, int32_t num_inputs) const noexcept {
  return guarded("getOutputDataTypes", [&]() -> Status {
    if (Status status = check_counts(num_inputs, num_outputs); !status.ok()) return status;
    const DType query = to_dtype(input_types[0]).value_or(DType::kFloat32);
    for (int32_t i = 0; i < num_inputs; ++i) {
      const Status status = plugin::check_dtype(node_.inputs[i], to_dtype(input_types[i]), query);
      if (!status.ok()) return status;
    }
    if (Status status = plugin::check_output_dtype(node_, query); !status.ok()) return status;
    for (int32_t i = 0; i < num_outputs; ++i) {
      output_types[i] = to_data_type(plugin::dtype_of(node_, node_.outputs[i], query, query));
    }
    return {};
  });
}

int32_t FlashAttentionPlugin::getOutputShapes(const DimsExprs* inputs, int32_t num_inputs, const DimsExprs* /*shape_inputs*/,
                                              int32_t num_shape_inputs, DimsExprs* outputs, int32_t num_outputs,
                                              nvinfer1::IExprBuilder& builder) noexcept {
  return guarded("getOutputShapes", [&]() -> Status {
    if (Status status = check_counts(num_inputs, num_outputs); !status.ok()) return status;
    if (num_shape_inputs != 0) return invalid("the operator has no shape inputs");
    plugin::Layouts layouts;
    if (Status status = plugin::resolve_layouts(node_, inputs[0].nbDims, inputs[1].nbDims, inputs[2].nbDims, &layouts);
        !status.ok()) {
      return status;
    }
    std::vector<plugin::Shape<const IDimensionExpr*>> shapes(static_cast<size_t>(num_inputs));
    for (int32_t i = 0; i < num_inputs; ++i) {
      if (inputs[i].nbDims < 0 || inputs[i].nbDims > 4) {
        return invalid(std::string("input ") + plugin::name_of(node_.inputs[i]) + " has rank " +
                       std::to_string(inputs[i].nbDims) + ", expected 4 at most");
      }
      shapes[i].rank = inputs[i].nbDims;
      for (int32_t axis = 0; axis < inputs[i].nbDims; ++axis) shapes[i].dims[axis] = inputs[i].d[axis];
    }
    ExpressionAlgebra algebra{builder};
    const auto shape_of = [&](int slot) { return shapes[static_cast<size_t>(slot)]; };
    for (int32_t i = 0; i < num_outputs; ++i) {
      const plugin::Output output = node_.outputs[i];
      const auto shape = plugin::output_shape<const IDimensionExpr*>(node_, output, shape_of, layouts, algebra);
      if (Status status = write_shape(shape, output, &outputs[i]); !status.ok()) return status;
    }
    return {};
  });
}

bool FlashAttentionPlugin::supportsFormatCombination(int32_t pos, const DynamicPluginTensorDesc* in_out, int32_t num_inputs,
                                                     int32_t num_outputs) noexcept {
  bool supported = false;  // entries beyond pos are not yet filled in: none is read
  const int32_t result = guarded("supportsFormatCombination", [&]() -> Status {
    if (Status status = check_counts(num_inputs, num_outputs); !status.ok()) return status;
    if (pos < 0 || pos >= num_inputs + num_outputs) return invalid("position " + std::to_string(pos) + " is out of range");
    const std::optional<DType> dtype = to_dtype(in_out[pos].desc.type), query = to_dtype(in_out[0].desc.type);
    if (in_out[pos].desc.format != nvinfer1::TensorFormat::kLINEAR || !dtype || !query) return {};
    supported = pos < num_inputs ? plugin::accepts(node_.inputs[pos], *dtype, *query)
                                 : *dtype == plugin::dtype_of(node_, node_.outputs[pos - num_inputs], *query, *query);
    return {};
  });
  return result == kSuccess && supported;
}

int32_t FlashAttentionPlugin::configurePlugin(const DynamicPluginTensorDesc* in, int32_t num_inputs,
                                              const DynamicPluginTensorDesc* /*out*/, int32_t num_outputs) noexcept {
  return guarded("configurePlugin", [&]() -> Status {
    if (Status status = check_counts(num_inputs, num_outputs); !status.ok()) return status;
    for (Dims DynamicPluginTensorDesc::* corner : {&DynamicPluginTensorDesc::opt, &DynamicPluginTensorDesc::max}) {
      plugin::Problem problem;
      if (Status status = bind_at(node_, in, corner, &problem); !status.ok()) return status;
      if (Status status = validate(problem.params); !status.ok()) return status;
    }
    Device device;
    if (!find_device(&device).ok()) return {};  // without a GPU there is nothing to plan for
    state_.planned_compute_capability = device.compute_capability;
    state_.planned_num_sms = device.num_sms;
    state_.planned_shared_memory_bytes = device.shared_memory_bytes;
    size_t bytes = 0;
    if (Status status = reserved_workspace(node_, in, device, nullptr, &bytes); !status.ok()) return status;
    state_.reserved_workspace_bytes = std::max(state_.reserved_workspace_bytes, static_cast<int64_t>(bytes));
    return {};
  });
}

bool FlashAttentionPlugin::is_configured() const { return state_.planned_compute_capability > 0; }

const char* FlashAttentionPlugin::forced_kernel() const {
  return tactic_ > 0 ? kernel_name(DeviceType::kCuda, tactic_ - 1) : nullptr;
}

Status FlashAttentionPlugin::planned_device(Device* device) const {
  const Status status = find_device(device);
  if (!is_configured()) return status;
  const Device built_on{DeviceType::kCuda, static_cast<int>(state_.planned_compute_capability),
                        static_cast<int>(state_.planned_num_sms), static_cast<int>(state_.planned_shared_memory_bytes)};
  *device = trt::planned_device(built_on, status.ok() ? *device : built_on);
  return status;
}

size_t FlashAttentionPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                                              const DynamicPluginTensorDesc* /*outputs*/, int32_t num_outputs) const noexcept {
  size_t bytes = 0;
  const int32_t result = guarded("getWorkspaceSize", [&]() -> Status {
    if (Status status = check_counts(num_inputs, num_outputs); !status.ok()) return status;
    Device device;
    device.type = DeviceType::kCuda;
    const Status no_device = planned_device(&device);  // without a GPU nothing runs: what remains is the joined cache
    if (!no_device.ok() && no_device.code != StatusCode::kUnsupported) return no_device;
    return reserved_workspace(node_, inputs, device, forced_kernel(), &bytes);
  });
  return result == kSuccess ? bytes : kImpossibleBytes;
}

int32_t FlashAttentionPlugin::setTactic(int32_t tactic) noexcept {
  return guarded("setTactic", [&]() -> Status {
    if (tactic < 0 || (tactic > 0 && !kernel_name(DeviceType::kCuda, tactic - 1))) {
      return invalid("tactic " + std::to_string(tactic) + " is unknown");
    }
    tactic_ = tactic;
    return {};
  });
}

Status FlashAttentionPlugin::check_outputs(const plugin::Problem& problem, const PluginTensorDesc* out) const {
  for (size_t i = 0; i < node_.outputs.size(); ++i) {
    const plugin::Tensor& expected = problem.outputs[static_cast<int>(node_.outputs[i])];
    const Dims& dims = out[i].dims;
    const bool same = dims.nbDims == expected.rank && std::equal(dims.d, dims.d + expected.rank, expected.shape);
    if (same && out[i].type == to_data_type(expected.dtype)) continue;
    const std::optional<DType> dtype = to_dtype(out[i].type);
    return invalid(std::string("output ") + plugin::name_of(node_.outputs[i]) + " is " +
                   (dtype ? name_of(*dtype) : "another type") + " " + shape_text(dims.d, std::max(dims.nbDims, 0)) +
                   "; expected " + name_of(expected.dtype) + " " + shape_text(expected.shape, expected.rank));
  }
  return {};
}

int32_t FlashAttentionPlugin::onShapeChange(const PluginTensorDesc* in, int32_t num_inputs, const PluginTensorDesc* out,
                                            int32_t num_outputs) noexcept {
  return guarded("onShapeChange", [&]() -> Status {
    if (Status status = check_counts(num_inputs, num_outputs); !status.ok()) return status;
    plugin::Problem problem;
    if (Status status = bind_now(node_, in, nullptr, &problem); !status.ok()) return status;
    if (Status status = validate(problem.params); !status.ok()) return status;
    if (Status status = check_outputs(problem, out); !status.ok()) return status;
    if (!planned_device(&device_).ok()) device_ = {};  // enqueue says why
    return {};
  });
}

int32_t FlashAttentionPlugin::enqueue(const PluginTensorDesc* input_desc, const PluginTensorDesc* output_desc,
                                      const void* const* inputs, void* const* outputs, void* workspace,
                                      cudaStream_t stream) noexcept {
  return guarded("enqueue", [&]() -> Status {
    plugin::Problem problem;
    if (Status status = bind_now(node_, input_desc, inputs, &problem); !status.ok()) return status;
    if (Status status = check_outputs(problem, output_desc); !status.ok()) return status;
    if (device_.type != DeviceType::kCuda) {
      if (Status status = planned_device(&device_); !status.ok()) return status;
    }
    for (size_t i = 0; i < node_.outputs.size(); ++i) plugin::set_output(&problem, node_.outputs[i], outputs[i]);
    plugin::Plan plan;
    if (Status status = plugin::plan(problem, device_, &plan, forced_kernel()); !status.ok()) return status;
    ExecutionContext context;
    context.stream = stream;
    context.workspace = workspace;
    // TensorRT does not tell how much it reserved: what this plugin asked for. An object that was never configured, or whose
    // kernel is forced, has answered getWorkspaceSize for this very plan.
    const bool is_known = is_configured() && tactic_ == 0;
    context.workspace_bytes = is_known ? static_cast<size_t>(state_.reserved_workspace_bytes) : plan.workspace_bytes;
    return plugin::launch(plan, &problem, context);
  });
}

nvinfer1::IPluginV3* FlashAttentionPlugin::attachToContext(nvinfer1::IPluginResourceContext* /*context*/) noexcept {
  return clone();
}

const nvinfer1::PluginFieldCollection* FlashAttentionPlugin::getFieldsToSerialize() noexcept {
  const int32_t result = guarded("getFieldsToSerialize", [&]() -> Status {
    serialized_ = write_fields(state_);
    serialized_collection_ = {static_cast<int32_t>(serialized_.size()), serialized_.data()};
    return {};
  });
  return result == kSuccess ? &serialized_collection_ : nullptr;
}

}  // namespace fa::trt
