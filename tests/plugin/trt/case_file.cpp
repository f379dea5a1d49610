// SPDX-License-Identifier: Apache-2.0
// Reads case files, and makes plugin fields of a case. The format is written by case_file.py: words separated by blanks, strings
// quoted, one node from "case" to "end".
#include <cstring>
#include <fstream>
#include <iomanip>
#include <map>
#include <stdexcept>

#include "host.h"

namespace host {
namespace {

using nvinfer1::DataType;
using nvinfer1::PluginFieldType;

DataType type_of(const std::string& name) {
  static const std::map<std::string, DataType> types = {
      {"float32", DataType::kFLOAT}, {"float16", DataType::kHALF}, {"bfloat16", DataType::kBF16},     {"bool", DataType::kBOOL},
      {"int32", DataType::kINT32},   {"int64", DataType::kINT64},  {"float8_e4m3fn", DataType::kFP8},
  };
  return types.at(name);
}

std::vector<int64_t> read_list(std::istream& in) {
  size_t count = 0;
  in >> count;
  std::vector<int64_t> values(count);
  for (int64_t& value : values) in >> value;
  return values;
}

/// "float16 OFFSET NUM_BINDINGS, then a shape for each: RANK D0 D1 …"
TensorSpec read_tensor(std::istream& in) {
  TensorSpec tensor;
  std::string type;
  size_t num_bindings = 0;
  in >> type >> tensor.data_offset >> num_bindings;
  tensor.type = type_of(type);
  for (size_t i = 0; i < num_bindings; ++i) tensor.shapes.push_back(read_list(in));
  return tensor;
}

Attribute read_attribute(const std::string& type, std::istream& in) {
  Attribute attribute;
  attribute.type = type;
  in >> attribute.name;
  if (type == "INT") {
    attribute.ints.resize(1);
    in >> attribute.ints[0];
  } else if (type == "INTS") {
    attribute.ints = read_list(in);
  } else if (type == "FLOAT") {
    in >> attribute.number;
  } else if (type == "STRING") {
    in >> std::quoted(attribute.text);
  } else {
    throw std::runtime_error("unknown word " + type);
  }
  return attribute;
}

void add_integers(FieldSet* fields, const Attribute& attribute, FieldSet::Ints ints) {
  const int32_t length = static_cast<int32_t>(attribute.ints.size());
  if (ints == FieldSet::Ints::kInt64) {
    fields->add(attribute.name, PluginFieldType::kINT64, attribute.ints.data(), 8 * attribute.ints.size(), length);
    return;
  }
  const std::vector<int32_t> narrow(attribute.ints.begin(), attribute.ints.end());
  fields->add(attribute.name, PluginFieldType::kINT32, narrow.data(), 4 * narrow.size(), length);
}

}  // namespace

std::vector<Case> read_cases(const std::string& path) {
  std::ifstream in(path);
  if (!in) throw std::runtime_error("can't open " + path);
  std::vector<Case> cases;
  for (std::string word; in >> word;) {
    if (word == "case") {
      in >> std::quoted(cases.emplace_back().id);
    } else if (word == "input") {
      cases.back().inputs.push_back(read_tensor(in));
    } else if (word == "output") {
      cases.back().outputs.push_back(read_tensor(in));
    } else if (word != "end") {
      cases.back().attributes.push_back(read_attribute(word, in));
    }
    if (!in) throw std::runtime_error(path + ": unreadable after case " + std::to_string(cases.size()));
  }
  return cases;
}

size_t size_of(DataType type) {
  switch (type) {
    case DataType::kFLOAT:
    case DataType::kINT32:
      return 4;
    case DataType::kINT64:
      return 8;
    case DataType::kBOOL:
    case DataType::kFP8:
      return 1;
    default:
      return 2;
  }
}

size_t bytes_of(const TensorSpec& tensor, size_t binding) {
  size_t bytes = size_of(tensor.type);
  for (const int64_t size : tensor.shapes[binding]) bytes *= static_cast<size_t>(size);
  return bytes;
}

nvinfer1::Dims to_dims(const std::vector<int64_t>& shape) {
  nvinfer1::Dims dims{};
  dims.nbDims = static_cast<int32_t>(shape.size());
  for (size_t i = 0; i < shape.size(); ++i) dims.d[i] = shape[i];
  return dims;
}

std::vector<nvinfer1::PluginTensorDesc> describe(const std::vector<TensorSpec>& tensors, size_t binding) {
  std::vector<nvinfer1::PluginTensorDesc> descriptors;
  for (const TensorSpec& tensor : tensors) {
    descriptors.push_back({to_dims(tensor.shapes[binding]), tensor.type, nvinfer1::TensorFormat::kLINEAR, 1.0f});
  }
  return descriptors;
}

size_t workspace_of(const Plugin& plugin, const Case& node, size_t binding) {
  std::vector<nvinfer1::DynamicPluginTensorDesc> descriptors;
  for (const std::vector<TensorSpec>* tensors : {&node.inputs, &node.outputs}) {
    for (const nvinfer1::PluginTensorDesc& desc : describe(*tensors, binding)) {
      nvinfer1::DynamicPluginTensorDesc d{};
      d.desc = desc;
      d.min = d.opt = d.max = desc.dims;
      descriptors.push_back(d);
    }
  }
  const int32_t num_inputs = static_cast<int32_t>(node.inputs.size());
  return plugin.build->getWorkspaceSize(descriptors.data(), num_inputs, descriptors.data() + num_inputs,
                                        static_cast<int32_t>(node.outputs.size()));
}

bool plan_for(FieldSet* fields, int capability) {
  return fields->set("planned_compute_capability", capability) && fields->set("planned_num_sms", capability == 90 ? 132 : 108) &&
         fields->set("planned_shared_memory_bytes", (capability == 90 ? 227 : 163) * 1024);
}

FieldSet::FieldSet(const Case& node, Ints ints) {
  for (const Attribute& attribute : node.attributes) {
    if (attribute.type == "FLOAT") {
      add(attribute.name, PluginFieldType::kFLOAT32, &attribute.number, 4, 1);
    } else if (attribute.type == "STRING") {
      const size_t length = attribute.text.size() + (ints == Ints::kInt32 ? 1 : 0);  // the parser counts the NUL
      add(attribute.name, PluginFieldType::kCHAR, attribute.text.c_str(), length, static_cast<int32_t>(length));
    } else {
      add_integers(this, attribute, ints);
    }
  }
}

FieldSet::FieldSet(const nvinfer1::PluginFieldCollection& fields) {
  for (int32_t i = 0; i < fields.nbFields; ++i) {
    const nvinfer1::PluginField& field = fields.fields[i];
    const bool wide = field.type == PluginFieldType::kINT64 || field.type == PluginFieldType::kFLOAT64;
    const size_t element = wide ? 8 : field.type == PluginFieldType::kCHAR ? 1 : 4;
    add(field.name, field.type, field.data, element * static_cast<size_t>(field.length), field.length);
  }
}

void FieldSet::add(const std::string& name, PluginFieldType type, const void* data, size_t bytes, int32_t length) {
  Entry entry{std::make_unique<std::vector<char>>(name.c_str(), name.c_str() + name.size() + 1),
              std::make_unique<std::vector<char>>(bytes + 16, '\x5a'), type, length};  // no NUL beyond the end either
  if (bytes) std::memcpy(entry.data->data(), data, bytes);
  entries_.push_back(std::move(entry));
}

bool FieldSet::set(const std::string& name, int64_t value) {
  for (Entry& entry : entries_) {
    if (name != entry.name->data() || entry.type != PluginFieldType::kINT64 || entry.length != 1) continue;
    std::memcpy(entry.data->data(), &value, sizeof value);
    return true;
  }
  return false;
}

const nvinfer1::PluginFieldCollection* FieldSet::get() {
  fields_.clear();
  for (const Entry& entry : entries_) fields_.emplace_back(entry.name->data(), entry.data->data(), entry.type, entry.length);
  collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
  return &collection_;
}

void FieldSet::wipe() {
  for (Entry& entry : entries_) {
    std::fill(entry.name->begin(), entry.name->end() - 1, '?');
    std::fill(entry.data->begin(), entry.data->end(), '\x5a');
  }
  std::fill(fields_.begin(), fields_.end(), nvinfer1::PluginField{});
}

bool FieldSet::operator==(const FieldSet& other) const {
  if (entries_.size() != other.entries_.size()) return false;
  for (size_t i = 0; i < entries_.size(); ++i) {
    const Entry &a = entries_[i], &b = other.entries_[i];
    if (*a.name != *b.name || *a.data != *b.data || a.type != b.type || a.length != b.length) return false;
  }
  return true;
}

}  // namespace host
