// SPDX-License-Identifier: Apache-2.0
// The creator and the library's only two exports, which TensorRT's loadLibrary looks up. Fields are validated here, once: a
// plugin object that exists is a node that the operator accepts.
#include <cstdio>
#include <exception>
#include <memory>
#include <string>
#include <utility>

#include "fields.h"
#include "plugin.h"

namespace fa::trt {
namespace {

class FlashAttentionCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  const char* getPluginName() const noexcept override { return kPluginName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return attribute_fields(); }

  nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override {
    try {
      const std::string node_name = name ? name : "";
      PluginState state;
      plugin::Node node;
      Status status = read_fields(fields, phase, &state);
      // TensorRT's flag kTF32 is on by default, and no plugin can see it: without a word we do as TensorRT's own layers do then.
      if (state.attributes.float32_precision.empty()) state.attributes.float32_precision = "tf32";
      if (status.ok()) status = plugin::make_node(state.attributes, &node);
      if (const std::string feature = plugin::missing_in_tensorrt(node); status.ok() && !feature.empty()) {
        status = {StatusCode::kUnsupported,
                  feature + " is not in the TensorRT plugin yet; ONNX Runtime's CUDA and CPU providers run it"};
      }
      if (status.ok()) return std::make_unique<FlashAttentionPlugin>(node_name, std::move(node), std::move(state)).release();
      log_error(node_name, status.sentence);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "[faplugin] %s createPlugin: %s\n", kPluginName, error.what());
    }
    return nullptr;
  }
};

}  // namespace
}  // namespace fa::trt

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& num_creators) {
  static fa::trt::FlashAttentionCreator creator;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
  num_creators = 1;
  return creators;
}

/// TensorRT refuses a library without it. NOTE: the finder is never called: its virtual table is another in TensorRT 11.
extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* /*finder*/) {}
