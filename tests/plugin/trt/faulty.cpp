// SPDX-License-Identifier: Apache-2.0
// The plugin with one deliberate fault, which the conformance host must find: FA_FAULT says which, FA_PLUGIN is the true library.
// Every call but the faulty one goes to the true plugin.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace {

using namespace nvinfer1;

bool fault(const char* name) {
  const char* wanted = std::getenv("FA_FAULT");
  return wanted && std::strcmp(wanted, name) == 0;
}

class FaultyPlugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
 public:
  FaultyPlugin(IPluginV3* inner, std::vector<PluginField> kept) : inner_(inner), kept_(std::move(kept)) {
    core_ = static_cast<IPluginV3OneCore*>(inner->getCapabilityInterface(PluginCapabilityType::kCORE));
    build_ = static_cast<IPluginV3OneBuild*>(inner->getCapabilityInterface(PluginCapabilityType::kBUILD));
    runtime_ = static_cast<IPluginV3OneRuntime*>(inner->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  }

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    if (fault("wrong_cast") && type == PluginCapabilityType::kBUILD) {
      return reinterpret_cast<IPluginCapability*>(static_cast<IPluginV3*>(this));
    }
    if (type == PluginCapabilityType::kCORE) return static_cast<IPluginV3OneCore*>(this);
    if (type == PluginCapabilityType::kBUILD) return static_cast<IPluginV3OneBuild*>(this);
    return static_cast<IPluginV3OneRuntime*>(this);
  }
  IPluginV3* clone() noexcept override { return new FaultyPlugin(inner_->clone(), kept_); }

  const char* getPluginName() const noexcept override { return core_->getPluginName(); }
  const char* getPluginVersion() const noexcept override { return core_->getPluginVersion(); }
  const char* getPluginNamespace() const noexcept override { return core_->getPluginNamespace(); }

  int32_t getNbOutputs() const noexcept override { return build_->getNbOutputs(); }
  int32_t getOutputDataTypes(DataType* out, int32_t num_out, const DataType* in, int32_t num_in) const noexcept override {
    return build_->getOutputDataTypes(out, num_out, in, num_in);
  }
  int32_t getOutputShapes(const DimsExprs* in, int32_t num_in, const DimsExprs* shapes, int32_t num_shapes, DimsExprs* out,
                          int32_t num_out, IExprBuilder& builder) noexcept override {
    const int32_t status = build_->getOutputShapes(in, num_in, shapes, num_shapes, out, num_out, builder);
    if (fault("shape_off_by_one") && status == 0) {
      out[0].d[1] = builder.operation(DimensionOperation::kSUM, *out[0].d[1], *builder.constant(1));
    }
    return status;
  }
  bool supportsFormatCombination(int32_t pos, const DynamicPluginTensorDesc* d, int32_t num_in,
                                 int32_t num_out) noexcept override {
    if (fault("reads_later_formats") && pos + 1 < num_in + num_out && static_cast<int32_t>(d[pos + 1].desc.type) > 99)
      return false;
    return build_->supportsFormatCombination(pos, d, num_in, num_out);
  }
  int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t num_in, const DynamicPluginTensorDesc* out,
                          int32_t num_out) noexcept override {
    return build_->configurePlugin(in, num_in, out, num_out);
  }
  size_t getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t num_in, const DynamicPluginTensorDesc* out,
                          int32_t num_out) const noexcept override {
    const size_t bytes = build_->getWorkspaceSize(in, num_in, out, num_out);
    return fault("workspace_short") && bytes > 0 ? bytes - 1 : bytes;
  }
  int32_t getValidTactics(int32_t* tactics, int32_t count) noexcept override { return build_->getValidTactics(tactics, count); }
  int32_t getNbTactics() noexcept override { return build_->getNbTactics(); }
  const char* getTimingCacheID() noexcept override { return build_->getTimingCacheID(); }
  int32_t getFormatCombinationLimit() noexcept override { return build_->getFormatCombinationLimit(); }
  const char* getMetadataString() noexcept override { return build_->getMetadataString(); }

  int32_t setTactic(int32_t tactic) noexcept override { return runtime_->setTactic(tactic); }
  int32_t onShapeChange(const PluginTensorDesc* in, int32_t num_in, const PluginTensorDesc* out,
                        int32_t num_out) noexcept override {
    return runtime_->onShapeChange(in, num_in, out, num_out);
  }
  int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc* out, const void* const* inputs, void* const* outputs,
                  void* workspace, cudaStream_t stream) noexcept override {
    return runtime_->enqueue(in, out, inputs, outputs, workspace, stream);
  }
  IPluginV3* attachToContext(IPluginResourceContext* context) noexcept override {
    return new FaultyPlugin(runtime_->attachToContext(context), kept_);
  }
  const PluginFieldCollection* getFieldsToSerialize() noexcept override {
    if (!fault("kept_pointer")) return runtime_->getFieldsToSerialize();
    collection_ = {static_cast<int32_t>(kept_.size()), kept_.data()};
    return &collection_;
  }

 private:
  std::unique_ptr<IPluginV3> inner_;
  std::vector<PluginField> kept_;  // as the creator got them: their data belongs to the parser
  PluginFieldCollection collection_{};
  IPluginV3OneCore* core_;
  IPluginV3OneBuild* build_;
  IPluginV3OneRuntime* runtime_;
};

class FaultyCreator final : public IPluginCreatorV3One {
 public:
  explicit FaultyCreator(IPluginCreatorV3One& inner) : inner_(inner) {}
  const char* getPluginName() const noexcept override { return inner_.getPluginName(); }
  const char* getPluginVersion() const noexcept override { return inner_.getPluginVersion(); }
  const char* getPluginNamespace() const noexcept override { return inner_.getPluginNamespace(); }
  const PluginFieldCollection* getFieldNames() noexcept override { return inner_.getFieldNames(); }
  IPluginV3* createPlugin(const char* name, const PluginFieldCollection* fields, TensorRTPhase phase) noexcept override {
    IPluginV3* plugin = inner_.createPlugin(name, fields, phase);
    if (!plugin) return nullptr;
    return new FaultyPlugin(plugin, std::vector<PluginField>(fields->fields, fields->fields + fields->nbFields));
  }

 private:
  IPluginCreatorV3One& inner_;
};

}  // namespace

extern "C" __attribute__((visibility("default"))) IPluginCreatorInterface* const* getCreators(int32_t& num_creators) {
  const char* path = std::getenv("FA_PLUGIN");
  void* library = path ? dlopen(path, RTLD_NOW) : nullptr;
  void* symbol = library ? dlsym(library, "getCreators") : nullptr;
  num_creators = 0;
  if (!symbol) return nullptr;
  int32_t num_inner = 0;
  auto* const* inner = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(symbol)(num_inner);
  static FaultyCreator creator(*static_cast<IPluginCreatorV3One*>(inner[0]));
  static IPluginCreatorInterface* const creators[] = {&creator};
  num_creators = 1;
  return creators;
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(ILoggerFinder* /*finder*/) {}
