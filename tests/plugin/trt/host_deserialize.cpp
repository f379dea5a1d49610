// SPDX-License-Identifier: Apache-2.0
// What a runtime does before the first enqueue: createPlugin from serialised fields, setTactic, attachToContext, onShapeChange.
// No GPU.
#include <memory>
#include <utility>

#include "host.h"
#include "planned_device.h"

namespace host {
namespace {

using nvinfer1::PluginTensorDesc;

constexpr fa::Device kA100{fa::DeviceType::kCuda, 80, 108, 163 * 1024}, kH100{fa::DeviceType::kCuda, 90, 132, 227 * 1024},
    kBlackwell{fa::DeviceType::kCuda, 120, 188, 99 * 1024};

FieldSet fields_of(const Plugin& plugin, Report& report, const std::string& what) {
  const nvinfer1::PluginFieldCollection* fields = plugin ? plugin.runtime->getFieldsToSerialize() : nullptr;
  return report.check(fields != nullptr, what) ? FieldSet(*fields) : FieldSet();
}

void change_shapes(const Plugin& context, const Case& node, Report& report) {
  for (size_t binding = 0; binding < node.num_bindings(); ++binding) {
    const std::vector<PluginTensorDesc> in = describe(node.inputs, binding), out = describe(node.outputs, binding);
    const int32_t num_inputs = static_cast<int32_t>(in.size()), num_outputs = static_cast<int32_t>(out.size());
    const auto on_shape_change = [&](const std::vector<PluginTensorDesc>& inputs, const std::vector<PluginTensorDesc>& outputs) {
      return context.runtime->onShapeChange(inputs.data(), num_inputs, outputs.data(), num_outputs);
    };
    report.check(on_shape_change(in, out) == 0, node.id + ": onShapeChange");
    std::vector<PluginTensorDesc> wrong = out;
    wrong[0].dims.d[1] += 1;
    report.check(on_shape_change(in, wrong) != 0, node.id + ": onShapeChange refuses a wrong output shape");
    wrong = in;
    wrong[1].dims.d[0] += 1;
    report.check(on_shape_change(wrong, out) != 0, node.id + ": onShapeChange refuses a key of another batch size");
    wrong = in;
    wrong[2].dims.d[0] = -1;
    report.check(on_shape_change(wrong, out) != 0, node.id + ": onShapeChange refuses an unknown size");
  }
}

/// The workspace is that of the GPU that the engine was built on, here an A100, an H100, and an H100 that is left only what an
/// A100 can, whichever GPU there is now.
void check_planned_workspace(const Source& source, const Case& node, Serialized& serialized, Report& report) {
  size_t bytes[3] = {};
  for (int i = 0; i < 3; ++i) {
    FieldSet fields(*serialized.fields.get());
    if (!report.check(plan_for(&fields, i == 0 ? 80 : 90), node.id + ": the GPU that was planned for is serialised")) return;
    if (i == 2) fields.set("planned_compute_capability", fa::trt::planned_device(kH100, kA100).compute_capability);
    Plugin plugin(source.creator->createPlugin(node.id.c_str(), fields.get(), nvinfer1::TensorRTPhase::kRUNTIME), report,
                  node.id + ": createPlugin for another GPU");
    if (!plugin) return;
    bytes[i] = workspace_of(plugin, node, 0);
  }
  report.check(bytes[2] <= bytes[1], node.id + ": an engine built on an H100 reserves what it needs on other GPUs");
  // The Hopper kernel needs memory for its tile counter, and more multiprocessors take more parts of split keys. Rows without a
  // key that get the mean of the values are the exception: it writes them itself, and the other one leaves them to a kernel of
  // their own.
  if (node.id.find("empty_row=mean") != std::string::npos) return;
  report.check(bytes[0] <= bytes[1], node.id + ": an engine built on an A100 needs no more than one built on an H100");
}

/// What no builder serialises is refused, and does not end the process when memory is planned.
void check_damaged_plan(const Source& source, const Case& node, Serialized& serialized, Report& report) {
  for (const auto& [field, value] : {std::pair<const char*, int64_t>{"planned_num_sms", 0},
                                     {"planned_shared_memory_bytes", int64_t{1} << 40},
                                     {"planned_compute_capability", -90},
                                     {"reserved_workspace_bytes", -1}}) {
    FieldSet fields(*serialized.fields.get());
    if (!plan_for(&fields, 90) || !fields.set(field, value)) return;
    const std::unique_ptr<nvinfer1::IPluginV3> plugin(
        source.creator->createPlugin("probe", fields.get(), nvinfer1::TensorRTPhase::kRUNTIME));
    report.check(plugin == nullptr, node.id + ": " + field + " of a damaged engine is refused");
  }
}

/// What a later version of the plugin may have serialised is not left out without a word.
void check_later_version(const Source& source, const Case& node, Serialized& serialized, Report& report) {
  FieldSet fields(*serialized.fields.get());
  const int64_t value = 1;
  fields.add("later_attribute", nvinfer1::PluginFieldType::kINT64, &value, sizeof value, 1);
  const std::unique_ptr<nvinfer1::IPluginV3> plugin(
      source.creator->createPlugin("probe", fields.get(), nvinfer1::TensorRTPhase::kRUNTIME));
  report.check(plugin == nullptr, node.id + ": an engine of a later version is refused");
}

}  // namespace

void check_planned_devices(Report& report) {
  const auto capability = [](const fa::Device& built_on, const fa::Device& actual) {
    return fa::trt::planned_device(built_on, actual).compute_capability;
  };
  report.check(capability(kH100, kH100) == 90, "an engine built on an H100 plans for one");
  report.check(capability(kA100, kH100) == 80, "on a newer GPU an engine takes the kernels that it took");
  report.check(capability(kH100, kA100) == 80, "on an older GPU an engine takes no kernels but that GPU's");
  for (const auto& [built_on, actual] : {std::pair{kH100, kBlackwell}, std::pair{kBlackwell, kH100}})
    report.check(capability(built_on, actual) < 90, "kernels of a GPU's own run on no other");
  const fa::Device left = fa::trt::planned_device(kH100, kBlackwell);
  report.check(left.num_sms == kH100.num_sms && left.shared_memory_bytes == kBlackwell.shared_memory_bytes,
               "the splits stay, and no more shared memory is taken than there is");
}

void drive_deserialization(const Source& source, const Case& node, Serialized& serialized, Report& report) {
  FieldSet copy(*serialized.fields.get());
  auto plugin =
      std::make_unique<Plugin>(source.creator->createPlugin(node.id.c_str(), copy.get(), nvinfer1::TensorRTPhase::kRUNTIME),
                               report, node.id + ": createPlugin from serialised fields");
  copy.wipe();
  if (!*plugin) return;
  report.check(plugin->runtime->setTactic(0) == 0, node.id + ": setTactic after deserialisation");
  report.check(fields_of(*plugin, report, node.id + ": fields of the re-created plugin") == serialized.fields,
               node.id + ": serialised again, the fields are equal");
  report.check(plugin->build->getNbOutputs() == static_cast<int32_t>(node.outputs.size()),
               node.id + ": re-created, getNbOutputs");
  check_planned_workspace(source, node, serialized, report);
  check_damaged_plan(source, node, serialized, report);
  check_later_version(source, node, serialized, report);
  Plugin first(plugin->runtime->attachToContext(nullptr), report, node.id + ": first context");
  Plugin second(plugin->runtime->attachToContext(nullptr), report, node.id + ": second context");
  plugin.reset();  // contexts outlive what they were attached from
  if (!first || !second) return;
  report.check(first.get() != second.get(), node.id + ": contexts are objects of their own");
  change_shapes(first, node, report);
  change_shapes(second, node, report);
  report.check(fields_of(second, report, node.id + ": fields of a context") == serialized.fields,
               node.id + ": a context's fields are equal");
}

}  // namespace host
