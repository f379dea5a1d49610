// SPDX-License-Identifier: Apache-2.0
// The library as a file, and its creator: names, field lists, and createPlugin with every kind of field that a parser, a Python
// user or a mistake may bring.
#include <dlfcn.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <thread>

#include "host.h"

namespace host {
namespace {

using nvinfer1::PluginFieldType;
using nvinfer1::TensorRTPhase;

/// Does the creator make a plugin of these fields?
bool creates(const Source& source, FieldSet& fields) {
  const std::unique_ptr<nvinfer1::IPluginV3> plugin(source.creator->createPlugin("probe", fields.get(), TensorRTPhase::kBUILD));
  return plugin != nullptr;
}

template <class Value>
FieldSet one(const std::string& name, PluginFieldType type, std::vector<Value> values) {
  FieldSet fields;
  fields.add(name, type, values.data(), values.size() * sizeof(Value), static_cast<int32_t>(values.size()));
  return fields;
}

FieldSet one(const std::string& name, const std::string& text) {
  FieldSet fields;
  fields.add(name, PluginFieldType::kCHAR, text.data(), text.size(), static_cast<int32_t>(text.size()));
  return fields;
}

void check_accepted_fields(const Source& source, Report& report) {
  const auto accept = [&](FieldSet fields, const std::string& what) {
    report.check(creates(source, fields), "accepted: " + what);
  };
  accept({}, "no field at all");
  accept(one<int32_t>("q_num_heads", PluginFieldType::kINT32, {8}), "an int as kINT32");
  accept(one<int64_t>("q_num_heads", PluginFieldType::kINT64, {8}), "an int as kINT64");
  accept(one<float>("scale", PluginFieldType::kFLOAT32, {0.125f}), "a float");
  accept(one("alignment", std::string("top_left\0", 9)), "a string whose length counts the NUL");
  accept(one("alignment", "top_left"), "a string without NUL");
  accept(one("query_layout", std::string("\0", 1)), "an empty string with NUL");
  accept(one("query_layout", ""), "a string of length 0");
  accept(one<int32_t>("packed_columns", PluginFieldType::kINT32, {}), "an empty list");
  accept(one("optional_inputs", "attn_mask,sinks"), "optional inputs");
}

void check_refused_fields(const Source& source, Report& report) {
  const auto refuse = [&](FieldSet fields, const std::string& what) {
    report.check(!creates(source, fields), "refused: " + what);
  };
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  refuse(one<float>("q_num_heads", PluginFieldType::kFLOAT32, {8}), "q_num_heads as kFLOAT32");
  refuse(one<int32_t>("q_num_heads", PluginFieldType::kINT32, {8, 8}), "q_num_heads of length 2");
  refuse(one<int32_t>("q_num_heads", PluginFieldType::kINT32, {}), "q_num_heads of length 0");
  refuse(one<int32_t>("q_num_heads", PluginFieldType::kINT32, {-1}), "negative q_num_heads");
  refuse(one<int64_t>("q_num_heads", PluginFieldType::kINT8, {8}), "q_num_heads as kINT8");
  refuse(one<int32_t>("is_causal", PluginFieldType::kINT32, {2}), "is_causal 2");
  refuse(one<int32_t>("left_window_size", PluginFieldType::kINT32, {-2}), "left_window_size -2");
  refuse(one<int32_t>("right_window_size", PluginFieldType::kINT32, {-7}), "right_window_size -7");
  refuse(one<float>("scale", PluginFieldType::kFLOAT32, {nan}), "scale NaN");
  refuse(one<float>("scale", PluginFieldType::kFLOAT32, {infinity}), "scale infinite");
  refuse(one<int32_t>("scale", PluginFieldType::kINT32, {1}), "scale as kINT32");
  refuse(one<float>("softcap", PluginFieldType::kFLOAT32, {-1.0f}), "negative softcap");
  refuse(one("alignment", "left"), "an unknown alignment");
  refuse(one("alignment", std::string("top_left\0x", 10)), "a NUL inside a string");
  refuse(one<int32_t>("alignment", PluginFieldType::kINT32, {1}), "alignment as kINT32");
  refuse(one("query_layout", "SBHD"), "an unknown layout");
  refuse(one("optional_inputs", "mask"), "an unknown optional input");
  refuse(one("optional_inputs", "sinks,sinks"), "an optional input twice");
  refuse(one("optional_inputs", "sinks,"), "an optional input without a name");
  refuse(one("optional_inputs", "past_key"), "past_key without past_value");
  refuse(one("optional_outputs", "output"), "the first output as an optional one");
  refuse(one("optional_outputs", "lse,present_key"), "optional outputs out of order");
  refuse(one<int32_t>("packed_columns", PluginFieldType::kINT32, {0, 1, 2, 3, 4}), "five packed columns");
  refuse(one<int32_t>("packed_columns", PluginFieldType::kINT32, {0, 64, 0, 64, 0, 64}), "packed columns without head_dim");
  refuse(one<int32_t>("no_such_attribute", PluginFieldType::kINT32, {1}), "an unknown attribute");
  const nvinfer1::PluginField null_data("q_num_heads", nullptr, PluginFieldType::kINT32, 1);
  const nvinfer1::PluginField null_text("alignment", nullptr, PluginFieldType::kCHAR, 5);
  const nvinfer1::PluginField negative("alignment", "onnx", PluginFieldType::kCHAR, -1);
  const nvinfer1::PluginField nameless(nullptr, "onnx", PluginFieldType::kCHAR, 4);
  for (const nvinfer1::PluginField* field : {&null_data, &null_text, &negative, &nameless}) {
    const nvinfer1::PluginFieldCollection collection{1, field};
    report.check(!source.creator->createPlugin("probe", &collection, TensorRTPhase::kBUILD),
                 "refused: a field without data or a name");
  }
  const nvinfer1::PluginFieldCollection no_array{3, nullptr};
  report.check(!source.creator->createPlugin("probe", &no_array, TensorRTPhase::kBUILD), "refused: three fields at null");
  report.check(!source.creator->createPlugin("probe", nullptr, TensorRTPhase::kBUILD), "refused: no collection");
  report.check(!source.creator->createPlugin(nullptr, nullptr, TensorRTPhase::kRUNTIME), "refused: nothing at all");
}

void check_names(const Source& source, Report& report) {
  nvinfer1::IPluginCreatorV3One& creator = *source.creator;
  report.check(std::strcmp(creator.getPluginName(), "FlashAttention") == 0, "creator: name", creator.getPluginName());
  report.check(std::strcmp(creator.getPluginVersion(), "1") == 0, "creator: version", creator.getPluginVersion());
  report.check(creator.getPluginNamespace()[0] == '\0', "creator: namespace is empty", creator.getPluginNamespace());
  report.check(creator.getPluginName() == creator.getPluginName(), "creator: the name's address is stable");
  const nvinfer1::PluginFieldCollection* fields = creator.getFieldNames();
  if (!report.check(fields && fields->nbFields > 0 && fields->fields, "creator: field names")) return;
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    report.check(fields->fields[i].name && fields->fields[i].name[0], "creator: field " + std::to_string(i) + " has a name");
  }
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int n = 0; n < 1000; ++n) {
        if (creator.getFieldNames()->fields != fields->fields) report.check(false, "creator: field names are stable");
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

/// Each attribute of the cases is one that the creator lists: a parser passes no other.
void check_listed(const Source& source, const std::vector<Case>& cases, Report& report) {
  const nvinfer1::PluginFieldCollection* fields = source.creator->getFieldNames();
  for (const Case& node : cases) {
    for (const Attribute& attribute : node.attributes) {
      bool listed = false;
      for (int32_t i = 0; i < fields->nbFields; ++i) listed |= attribute.name == fields->fields[i].name;
      if (!listed) report.check(false, node.id + ": attribute " + attribute.name + " is not in the creator's list");
    }
  }
}

}  // namespace

void check_library(const Source& source, Report& report) {
  for (int round = 0; round < 2; ++round) {  // opened, closed and opened again
    void* library = dlopen(source.plugin_path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!report.check(library != nullptr, "library: dlopen(RTLD_NOW)", library ? "" : dlerror())) return;
    using SetLoggerFinder = void (*)(void*);
    const auto set_logger_finder = reinterpret_cast<SetLoggerFinder>(dlsym(library, "setLoggerFinder"));
    if (report.check(set_logger_finder != nullptr, "library: exports setLoggerFinder")) {
      char no_finder[64];
      std::memset(no_finder, 0x5a, sizeof no_finder);
      set_logger_finder(nullptr);
      set_logger_finder(no_finder);  // must not be called: its virtual table differs between versions
    }
    report.check(dlsym(library, "getCreators") != nullptr, "library: exports getCreators");
    report.check(dlclose(library) == 0, "library: dlclose");
  }
}

void check_creator(const Source& source, const std::vector<Case>& cases, Report& report) {
  check_names(source, report);
  check_listed(source, cases, report);
  check_accepted_fields(source, report);
  check_refused_fields(source, report);
}

}  // namespace host
