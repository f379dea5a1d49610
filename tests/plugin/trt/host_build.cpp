// SPDX-License-Identifier: Apache-2.0
// The build phase of one node, in the order of a real builder: createPlugin, the network's clone, types and symbolic shapes,
// formats depth-first with the later entries invalid, attachToContext, configurePlugin with a range of shapes, workspace,
// serialisation.
#include <algorithm>
#include <cstring>
#include <set>

#include "expressions.h"
#include "host.h"

namespace host {
namespace {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::TensorFormat;

constexpr int kNumTypes = 12;
constexpr int kNumFormats = 13;

/// One node on its way through the builder.
class BuildDriver {
 public:
  BuildDriver(const Source& source, const Case& node, Report& report) : source_(source), node_(node), report_(report) {
    for (const TensorSpec& tensor : node.inputs) input_types_.push_back(tensor.type);
  }

  std::unique_ptr<Serialized> run() {
    Plugin network = add_to_network();
    if (!network) return nullptr;
    check_counts(network);
    check_shapes(network);
    Plugin first = clone(network, "clone for the build");
    Plugin building = clone(first, "clone of the clone");
    if (!building) return nullptr;
    for (int pass = 0; pass < 2; ++pass) {
      check_formats(building);
      report_.check(building.build->getFormatCombinationLimit() >= 1, name("getFormatCombinationLimit"));
      const char* id = building.build->getTimingCacheID();
      const char* same = first.build->getTimingCacheID();
      report_.check((!id && !same) || (id && same && std::strcmp(id, same) == 0), name("getTimingCacheID is equal in clones"));
    }
    auto serialized = std::make_unique<Serialized>();
    check_configuration(building, *serialized);
    return serialize(building, *serialized) ? std::move(serialized) : nullptr;
  }

 private:
  std::string name(const std::string& step) const { return node_.id + ": " + step; }

  Plugin clone(const Plugin& plugin, const std::string& step) {
    nvinfer1::IPluginV3* copy = plugin ? plugin.get()->clone() : nullptr;
    report_.check(copy != plugin.get(), name(step + " is another object"));
    return Plugin(copy, report_, name(step));
  }

  /// createPlugin and addPluginV3: the network keeps a clone; the caller's object and the fields die.
  Plugin add_to_network() {
    FieldSet fields(node_, FieldSet::Ints::kInt32);
    Plugin created(source_.creator->createPlugin(node_.id.c_str(), fields.get(), nvinfer1::TensorRTPhase::kBUILD), report_,
                   name("createPlugin"));
    fields.wipe();
    if (!created) return created;
    report_.check(std::strcmp(created.core->getPluginName(), source_.creator->getPluginName()) == 0 &&
                      std::strcmp(created.core->getPluginVersion(), source_.creator->getPluginVersion()) == 0 &&
                      std::strcmp(created.core->getPluginNamespace(), source_.creator->getPluginNamespace()) == 0,
                  name("the plugin's names are its creator's"));
    check_types(created);
    return clone(created, "clone for the network");
  }

  void check_types(const Plugin& plugin) {
    const int32_t num_outputs = plugin.build->getNbOutputs();
    const std::string count = std::to_string(num_outputs);
    if (!report_.check(num_outputs == static_cast<int32_t>(node_.outputs.size()), name("getNbOutputs"), count)) return;
    std::vector<DataType> types(node_.outputs.size() + 1, static_cast<DataType>(99));
    const int32_t num_inputs = static_cast<int32_t>(input_types_.size());
    const int32_t status = plugin.build->getOutputDataTypes(types.data(), num_outputs, input_types_.data(), num_inputs);
    report_.check(status == 0, name("getOutputDataTypes"));
    for (int32_t i = 0; i < num_outputs; ++i) {
      report_.check(types[i] == node_.outputs[i].type, name("getOutputDataTypes of output " + std::to_string(i)));
    }
    report_.check(types.back() == static_cast<DataType>(99), name("getOutputDataTypes writes past its outputs"));
  }

  void check_counts(const Plugin& plugin) {
    const int32_t num_inputs = static_cast<int32_t>(input_types_.size());
    const int32_t num_outputs = static_cast<int32_t>(node_.outputs.size());
    std::vector<DataType> inputs = input_types_, outputs(num_outputs + 1);
    inputs.push_back(DataType::kFLOAT);
    const auto refused = [&](int32_t in, int32_t out, const std::vector<DataType>& types, const std::string& what) {
      report_.check(plugin.build->getOutputDataTypes(outputs.data(), out, types.data(), in) != 0,
                    name("getOutputDataTypes refuses " + what));
    };
    refused(num_inputs + 1, num_outputs, inputs, "one input more");
    refused(num_inputs - 1, num_outputs, inputs, "one input less");
    refused(num_inputs, num_outputs + 1, inputs, "one output more");
    refused(num_inputs, num_outputs - 1, inputs, "one output less");
    inputs[1] = DataType::kINT8;
    refused(num_inputs, num_outputs, inputs, "an int8 key");
  }

  void check_shapes(const Plugin& plugin) {
    for (const bool symbolic : {true, false}) {
      const size_t num_evaluations = symbolic ? 1 : node_.num_bindings();
      for (size_t binding = 0; binding < num_evaluations; ++binding) evaluate_shapes(plugin, symbolic, binding);
    }
    check_wrong_ranks(plugin);
  }

  std::vector<nvinfer1::DimsExprs> input_expressions(ExpressionBuilder& builder, bool symbolic, size_t binding) const {
    std::vector<nvinfer1::DimsExprs> inputs(node_.inputs.size());
    size_t symbol = 0;
    for (size_t i = 0; i < inputs.size(); ++i) {
      const std::vector<int64_t>& shape = node_.inputs[i].shapes[binding];
      inputs[i].nbDims = static_cast<int32_t>(shape.size());
      for (size_t axis = 0; axis < shape.size(); ++axis, ++symbol) {
        inputs[i].d[axis] = symbolic ? builder.symbol(symbol) : builder.number(shape[axis]);
      }
    }
    return inputs;
  }

  /// Output shapes: once symbolic, then evaluated for every binding; or with the constants of one binding.
  void evaluate_shapes(const Plugin& plugin, bool symbolic, size_t constant_binding) {
    ExpressionBuilder builder;
    const std::vector<nvinfer1::DimsExprs> inputs = input_expressions(builder, symbolic, constant_binding);
    std::vector<nvinfer1::DimsExprs> outputs(node_.outputs.size());
    const int32_t status = plugin.build->getOutputShapes(inputs.data(), static_cast<int32_t>(inputs.size()), nullptr, 0,
                                                         outputs.data(), static_cast<int32_t>(outputs.size()), builder);
    if (!report_.check(status == 0, name("getOutputShapes"))) return;
    for (size_t binding = 0; binding < node_.num_bindings(); ++binding) {
      if (!symbolic && binding != constant_binding) continue;
      std::vector<int64_t> symbols;
      for (const TensorSpec& input : node_.inputs) {
        symbols.insert(symbols.end(), input.shapes[binding].begin(), input.shapes[binding].end());
      }
      for (size_t i = 0; i < outputs.size(); ++i) compare_shape(outputs[i], symbols, node_.outputs[i].shapes[binding], i);
    }
  }

  void compare_shape(const nvinfer1::DimsExprs& dims, const std::vector<int64_t>& symbols, const std::vector<int64_t>& expected,
                     size_t output) {
    const std::string what = name("getOutputShapes of output " + std::to_string(output));
    if (!report_.check(dims.nbDims == static_cast<int32_t>(expected.size()), what + ": rank", std::to_string(dims.nbDims)))
      return;
    for (int32_t axis = 0; axis < dims.nbDims; ++axis) {
      const std::string of_axis = what + ", axis " + std::to_string(axis);
      if (!report_.check(dims.d[axis] != nullptr, of_axis, "null")) continue;
      const auto value = static_cast<const Expression*>(dims.d[axis])->evaluate(symbols);
      report_.check(value && *value == expected[axis], of_axis,
                    (value ? std::to_string(*value) : "undefined") + ", expected " + std::to_string(expected[axis]));
    }
  }

  void check_wrong_ranks(const Plugin& plugin) {
    const int32_t num_inputs = static_cast<int32_t>(node_.inputs.size());
    const int32_t num_outputs = static_cast<int32_t>(node_.outputs.size());
    for (const int32_t rank : {0, 1, 2, 5, 8}) {
      for (size_t which = 0; which < 3; ++which) {
        ExpressionBuilder builder;
        std::vector<nvinfer1::DimsExprs> inputs = input_expressions(builder, true, 0), outputs(node_.outputs.size());
        inputs[which].nbDims = rank;
        for (int32_t axis = 0; axis < rank; ++axis) inputs[which].d[axis] = builder.number(4);
        const int32_t status =
            plugin.build->getOutputShapes(inputs.data(), num_inputs, nullptr, 0, outputs.data(), num_outputs, builder);
        report_.check(status != 0,
                      name("getOutputShapes refuses rank " + std::to_string(rank) + " of input " + std::to_string(which)));
      }
    }
    ExpressionBuilder builder;
    const std::vector<nvinfer1::DimsExprs> inputs = input_expressions(builder, true, 0);
    std::vector<nvinfer1::DimsExprs> outputs(node_.outputs.size());
    report_.check(plugin.build->getOutputShapes(inputs.data(), 2, nullptr, 0, outputs.data(), num_outputs, builder) != 0,
                  name("getOutputShapes refuses two inputs"));
  }

  /// Descriptors of all inputs and outputs with min, opt and max over the bindings; -1 where they differ.
  std::vector<DynamicPluginTensorDesc> describe_range(size_t first, size_t last) const {
    std::vector<DynamicPluginTensorDesc> descriptors;
    for (const std::vector<TensorSpec>* tensors : {&node_.inputs, &node_.outputs}) {
      for (const TensorSpec& tensor : *tensors) {
        DynamicPluginTensorDesc d{};
        d.desc = {to_dims(tensor.shapes[first]), tensor.type, TensorFormat::kLINEAR, 1.0f};
        d.min = d.max = d.opt = d.desc.dims;
        for (size_t binding = first; binding <= last; ++binding) {
          for (size_t axis = 0; axis < tensor.shapes[binding].size(); ++axis) {
            d.min.d[axis] = std::min(d.min.d[axis], tensor.shapes[binding][axis]);
            d.max.d[axis] = std::max(d.max.d[axis], tensor.shapes[binding][axis]);
            if (d.min.d[axis] != d.max.d[axis]) d.desc.dims.d[axis] = -1;
          }
        }
        descriptors.push_back(d);
      }
    }
    return descriptors;
  }

  /// Is this type and format taken at `pos`? Asked twice, with different nonsense in the entries that are not yet decided.
  bool supports(const Plugin& plugin, std::vector<DynamicPluginTensorDesc>& descriptors, size_t pos, int type, int format) {
    const int32_t num_inputs = static_cast<int32_t>(node_.inputs.size());
    const int32_t num_outputs = static_cast<int32_t>(node_.outputs.size());
    descriptors[pos].desc.type = static_cast<DataType>(type);
    descriptors[pos].desc.format = static_cast<TensorFormat>(format);
    bool answers[2];
    for (const int round : {0, 1}) {
      for (size_t later = pos + 1; later < descriptors.size(); ++later) {
        std::memset(static_cast<void*>(&descriptors[later]), round ? 0x5a : 0xff, sizeof descriptors[later]);
      }
      answers[round] =
          plugin.build->supportsFormatCombination(static_cast<int32_t>(pos), descriptors.data(), num_inputs, num_outputs);
    }
    report_.check(answers[0] == answers[1], name("supportsFormatCombination reads later entries"));
    return answers[0];
  }

  void check_formats(const Plugin& plugin) {
    const std::vector<DynamicPluginTensorDesc> whole = describe_range(0, node_.num_bindings() - 1);
    std::vector<DynamicPluginTensorDesc> descriptors = whole;
    for (size_t pos = 0; pos < whole.size(); ++pos) {
      std::set<int> types;
      for (int type = 0; type < kNumTypes; ++type) {
        for (int format = 0; format < kNumFormats; ++format) {
          const bool supported = supports(plugin, descriptors, pos, type, format);
          if (supported) types.insert(type);
          if (supported) report_.check(format == 0, name("supportsFormatCombination takes a format beside kLINEAR"));
        }
      }
      const std::string where = name("supportsFormatCombination at " + std::to_string(pos));
      report_.check(types.count(static_cast<int>(whole[pos].desc.type)) == 1, where, "the node's own type is refused");
      const bool fixed = pos == 1 || pos == 2 || pos >= node_.inputs.size();
      report_.check(fixed ? types.size() == 1 : !types.empty(), where, std::to_string(types.size()) + " types are taken");
      descriptors[pos] = whole[pos];
    }
  }

  std::unique_ptr<Plugin> configured(const Plugin& building, const std::vector<DynamicPluginTensorDesc>& d,
                                     const std::string& step) {
    auto plugin = std::make_unique<Plugin>(building.runtime->attachToContext(nullptr), report_, name(step));
    if (!*plugin) return nullptr;
    report_.check(plugin->get() != building.get(), name(step + " is another object"));
    const int32_t num_inputs = static_cast<int32_t>(node_.inputs.size());
    const int32_t num_outputs = static_cast<int32_t>(node_.outputs.size());
    const int32_t status = plugin->build->configurePlugin(d.data(), num_inputs, d.data() + num_inputs, num_outputs);
    return report_.check(status == 0, name(step + ": configurePlugin")) ? std::move(plugin) : nullptr;
  }

  size_t workspace(const Plugin& plugin, const std::vector<DynamicPluginTensorDesc>& d) {
    const int32_t num_inputs = static_cast<int32_t>(node_.inputs.size());
    const int32_t num_outputs = static_cast<int32_t>(node_.outputs.size());
    const size_t bytes = plugin.build->getWorkspaceSize(d.data(), num_inputs, d.data() + num_inputs, num_outputs);
    const size_t again = plugin.build->getWorkspaceSize(d.data(), num_inputs, d.data() + num_inputs, num_outputs);
    report_.check(bytes == again, name("getWorkspaceSize is the same twice"));
    report_.check(bytes < (size_t{1} << 40), name("getWorkspaceSize"), std::to_string(bytes));
    const size_t impossible = plugin.build->getWorkspaceSize(d.data(), num_inputs - 1, d.data() + num_inputs, num_outputs);
    report_.check(impossible > (size_t{1} << 50), name("getWorkspaceSize of a wrong count of inputs"));
    return bytes;
  }

  void check_tactics(const Plugin& plugin) {
    const int32_t count = plugin.build->getNbTactics();
    if (!report_.check(count >= 0, name("getNbTactics"))) return;
    std::vector<int32_t> tactics(static_cast<size_t>(count) + 1, -7);
    report_.check(plugin.build->getValidTactics(tactics.data(), count) == 0, name("getValidTactics"));
    report_.check(tactics.back() == -7, name("getValidTactics writes past its end"));
    tactics.pop_back();
    for (const int32_t tactic : tactics) report_.check(tactic > 0, name("a custom tactic is positive"));
    report_.check(std::set<int32_t>(tactics.begin(), tactics.end()).size() == tactics.size(), name("tactics are unique"));
    report_.check(plugin.runtime->setTactic(1 << 30) != 0, name("setTactic refuses an unknown tactic"));
    report_.check(plugin.runtime->setTactic(0) == 0, name("setTactic(0)"));
  }

  /// One context over the whole range of shapes, and one for each binding; the range's workspace must suffice for each.
  void check_configuration(const Plugin& building, Serialized& serialized) {
    const size_t last = node_.num_bindings() - 1;
    const std::vector<DynamicPluginTensorDesc> range = describe_range(0, last);
    const auto whole = configured(building, range, "attachToContext for the range");
    if (!whole) return;
    check_tactics(*whole);
    const size_t bytes = workspace(*whole, range);
    for (size_t binding = 0; binding <= last; ++binding) {
      const std::vector<DynamicPluginTensorDesc> exact = describe_range(binding, binding);
      const auto plugin = configured(building, exact, "attachToContext for one shape");
      if (!plugin) return;
      serialized.workspace_bytes.push_back(workspace(*plugin, exact));
      report_.check(serialized.workspace_bytes.back() <= bytes, name("the range's workspace suffices for each shape in it"));
    }
    std::vector<DynamicPluginTensorDesc> wrong = range;
    wrong[1].opt.d[0] = wrong[1].max.d[0] += 1;
    const int32_t num_inputs = static_cast<int32_t>(node_.inputs.size());
    report_.check(whole->build->configurePlugin(wrong.data(), num_inputs, wrong.data() + num_inputs,
                                                static_cast<int32_t>(node_.outputs.size())) != 0,
                  name("configurePlugin refuses a key of another batch size"));
  }

  /// The final object: configured, given a tactic, asked for its workspace and written twice.
  bool serialize(const Plugin& building, Serialized& serialized) {
    const std::vector<DynamicPluginTensorDesc> range = describe_range(0, node_.num_bindings() - 1);
    const auto plugin = configured(building, range, "attachToContext for the engine");
    if (!plugin) return false;
    report_.check(plugin->runtime->setTactic(0) == 0, name("setTactic(0) on the engine's object"));
    for (int i = 0; i < 4; ++i) workspace(*plugin, range);
    plugin->build->getMetadataString();
    const nvinfer1::PluginFieldCollection* fields = plugin->runtime->getFieldsToSerialize();
    if (!report_.check(fields && fields->nbFields > 0 && fields->fields, name("getFieldsToSerialize"))) return false;
    serialized.fields = FieldSet(*fields);
    report_.check(serialized.fields == FieldSet(*plugin->runtime->getFieldsToSerialize()),
                  name("getFieldsToSerialize is the same twice"));
    return check_values(*fields);
  }

  /// Each attribute of the node is among the serialised fields, with its value. Catches a kept pointer into the parser's fields.
  bool check_values(const nvinfer1::PluginFieldCollection& fields) {
    bool all = true;
    for (const Attribute& attribute : node_.attributes) {
      bool found = false;
      for (int32_t i = 0; i < fields.nbFields; ++i) {
        const nvinfer1::PluginField& field = fields.fields[i];
        if (field.name && attribute.name == field.name) found = has_value(field, attribute);
      }
      all &= report_.check(found, name("serialised attribute " + attribute.name + " has the node's value"));
    }
    return all;
  }

  static bool has_value(const nvinfer1::PluginField& field, const Attribute& attribute) {
    if (attribute.type == "FLOAT") return *static_cast<const float*>(field.data) == attribute.number;
    if (attribute.type == "STRING") {
      const char* text = static_cast<const char*>(field.data);
      return std::string(text, strnlen(text, static_cast<size_t>(field.length))) == attribute.text;
    }
    if (field.length != static_cast<int32_t>(attribute.ints.size())) return false;
    for (int32_t i = 0; i < field.length; ++i) {
      const int64_t value = field.type == nvinfer1::PluginFieldType::kINT32 ? static_cast<const int32_t*>(field.data)[i]
                                                                            : static_cast<const int64_t*>(field.data)[i];
      if (value != attribute.ints[i]) return false;
    }
    return true;
  }

  const Source& source_;
  const Case& node_;
  Report& report_;
  std::vector<DataType> input_types_;
};

}  // namespace

std::unique_ptr<Serialized> drive_build(const Source& source, const Case& node, Report& report) {
  return BuildDriver(source, node, report).run();
}

}  // namespace host
