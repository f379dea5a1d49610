// SPDX-License-Identifier: Apache-2.0
// The conformance host: drives a compiled TensorRT plugin through the calls that TensorRT's builder and runtime make, in their
// order, and checks each answer. host.cpp has the command line; each phase has a file. The nodes to drive come from a case file
// (case_file.py writes it), so that the host holds no rule of the operator.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace host {

/// Collects what was checked. Thread-safe. A failed check prints one line at once; print_summary() tells the counts.
class Report {
 public:
  bool check(bool ok, const std::string& what, const std::string& detail = "");
  int print_summary() const;  // the exit status: 0, or 1 where a check failed or none was made

 private:
  mutable std::mutex mutex_;
  int64_t num_checks_ = 0;
  int64_t num_failures_ = 0;
};

struct Attribute {
  std::string type;  // INT, FLOAT, STRING, INTS: as in attributes.def
  std::string name;
  std::vector<int64_t> ints;
  float number = 0;
  std::string text;
};

struct TensorSpec {
  nvinfer1::DataType type = nvinfer1::DataType::kFLOAT;
  std::vector<std::vector<int64_t>> shapes;  // one for each binding
  int64_t data_offset = -1;                  // of the first binding's values in the data file; -1: none
};

/// One node: its attributes, and one or more bindings (sets of input shapes with the output shapes that are right for them).
struct Case {
  std::string id;
  std::vector<Attribute> attributes;
  std::vector<TensorSpec> inputs, outputs;
  size_t num_bindings() const { return inputs[0].shapes.size(); }
};

std::vector<Case> read_cases(const std::string& path);
size_t size_of(nvinfer1::DataType type);
size_t bytes_of(const TensorSpec& tensor, size_t binding);
nvinfer1::Dims to_dims(const std::vector<int64_t>& shape);

/// Plugin fields and the memory they point to, which wipe() overwrites: what a parser's buffers go through after createPlugin.
class FieldSet {
 public:
  enum class Ints { kInt32, kInt64 };

  FieldSet() = default;
  /// The fields of a case as the ONNX parser passes them (kINT32, a NUL counted in a string's length), or as a Python user does.
  FieldSet(const Case& node, Ints ints);
  /// A deep copy.
  explicit FieldSet(const nvinfer1::PluginFieldCollection& fields);

  void add(const std::string& name, nvinfer1::PluginFieldType type, const void* data, size_t bytes, int32_t length);
  /// Replaces the value of an integer field; false where there is none of this name.
  bool set(const std::string& name, int64_t value);
  const nvinfer1::PluginFieldCollection* get();
  void wipe();
  bool operator==(const FieldSet& other) const;

 private:
  struct Entry {
    std::unique_ptr<std::vector<char>> name, data;  // on the heap: pointers survive a move
    nvinfer1::PluginFieldType type;
    int32_t length;
  };
  std::vector<Entry> entries_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

/// A plugin object and its three capabilities, checked to be what they claim.
class Plugin {
 public:
  /// Takes ownership. `where` names the step in failures.
  Plugin(nvinfer1::IPluginV3* plugin, Report& report, const std::string& where);

  explicit operator bool() const { return core && build && runtime; }
  nvinfer1::IPluginV3* get() const { return plugin_.get(); }

  nvinfer1::IPluginV3OneCore* core = nullptr;
  nvinfer1::IPluginV3OneBuild* build = nullptr;
  nvinfer1::IPluginV3OneRuntime* runtime = nullptr;

 private:
  std::unique_ptr<nvinfer1::IPluginV3> plugin_;
};

/// Where the creator comes from: the library opened by itself, or the registry of a real TensorRT library.
struct Source {
  std::string plugin_path;
  std::string tensorrt_path;  // empty: dlopen alone
  nvinfer1::IPluginCreatorV3One* creator = nullptr;
};

/// What serialisation leaves of a case: how the runtime phase begins.
struct Serialized {
  FieldSet fields;
  std::vector<size_t> workspace_bytes;  // of each binding, asked with min = opt = max
};

void check_library(const Source& source, Report& report);
void check_creator(const Source& source, const std::vector<Case>& cases, Report& report);
/// Steps 1 to 7 of the build; null where a step failed so that going on makes no sense.
std::unique_ptr<Serialized> drive_build(const Source& source, const Case& node, Report& report);
/// For which GPU an engine plans that runs on another one than it was built on.
void check_planned_devices(Report& report);
/// Re-creation from serialised fields, contexts and shape changes: what needs no GPU.
void drive_deserialization(const Source& source, const Case& node, Serialized& serialized, Report& report);
/// Enqueue on a GPU, by each tactic and, as if it were one more, from an engine that was built on an A100. `output_path` gets a
/// byte, the number of tactics with that one, then for each case and tactic the outputs' size as int64 (-1: a forced kernel
/// refused the problem) and the outputs.
void drive_runtime(const Source& source, const std::vector<Case>& cases, const std::string& data_path,
                   const std::string& output_path, Report& report);

std::vector<nvinfer1::PluginTensorDesc> describe(const std::vector<TensorSpec>& tensors, size_t binding);
/// getWorkspaceSize of one binding's shapes alone.
size_t workspace_of(const Plugin& plugin, const Case& node, size_t binding);
/// Makes the fields those of an engine that was built on another GPU (hardware compatibility), the kind that `capability` names:
/// 80 an A100, 90 an H100. False where the plugin does not serialise the GPU that it was planned for.
bool plan_for(FieldSet* fields, int capability);

}  // namespace host
