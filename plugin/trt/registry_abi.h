// SPDX-License-Identifier: Apache-2.0
// TensorRT's plugin registry by the slots of its virtual table. NOTE: TensorRT 11 removed four methods of version 1, so one
// header's IPluginRegistry crashes in the other: registerCreator is slot 12 in 10.x and slot 8 in 11.x (Itanium C++ ABI).
// Used by the registrar and the tests' host, never by the plugin itself.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>

namespace fa::trt {

class Registry {
 public:
  /// `registry` as getPluginRegistry() gives it, `version` as getInferLibVersion() does (10.15.1 is 101501, 8.6.0 is 8600).
  Registry(void* registry, int32_t version) : registry_(registry), major_(version / (version < 10000 ? 1000 : 10000)) {}

  bool known() const { return registry_ && (major_ == 10 || major_ == 11); }
  int major() const { return major_; }

  /// A handle, or null where the file can't be loaded, lacks an entry point or brings a creator that is already there.
  void* load_library(const char* path) const { return call<void*>(kLoadLibrary, path); }
  void deregister_library(void* handle) const { call<void>(kLoadLibrary + 1, handle); }
  bool register_creator(nvinfer1::IPluginCreatorInterface& creator, const char* name_space) const {
    return call<bool>(kLoadLibrary + 2, &creator, name_space);
  }
  nvinfer1::IPluginCreatorInterface* get_creator(const char* name, const char* version, const char* name_space) const {
    return call<nvinfer1::IPluginCreatorInterface*>(kLoadLibrary + 4, name, version, name_space);
  }

 private:
  static constexpr int kLoadLibrary = 10;  // in 10.x; four less in 11.x

  template <class Result, class... Args>
  Result call(int slot_in_10, Args... args) const {
    const int slot = major_ == 10 ? slot_in_10 : slot_in_10 - 4;
    void** table = *static_cast<void***>(registry_);
    return reinterpret_cast<Result (*)(void*, Args...)>(table[slot])(registry_, args...);
  }

  void* registry_;
  int major_;
};

}  // namespace fa::trt
