// SPDX-License-Identifier: Apache-2.0
// libfa_trt_registrar.so: for hosts that only dlopen plugin libraries and never call getCreators (ONNX Runtime's TensorRT
// provider, trtexec --staticPlugins). Its constructor opens libfa_trt.so beside it and enters the creators in the registry of
// whichever TensorRT the process has loaded. Apart from libfa_trt.so, which TensorRT's own loadLibrary would otherwise register
// twice.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <string>

#include "registry_abi.h"

namespace {

void* find_in_tensorrt(const char* symbol) {
  if (void* found = dlsym(RTLD_DEFAULT, symbol)) return found;
  for (const char* name : {"libnvinfer.so.10", "libnvinfer.so.11"}) {
    if (void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD)) {
      if (void* found = dlsym(library, symbol)) return found;
    }
  }
  return nullptr;
}

std::string plugin_path() {
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(&plugin_path), &info) || !info.dli_fname) return "libfa_trt.so";
  const std::string own = info.dli_fname;
  return own.substr(0, own.find_last_of('/') + 1) + "libfa_trt.so";
}

/// Null, or why nothing was registered.
const char* register_creators() {
  const auto get_version = reinterpret_cast<int32_t (*)()>(find_in_tensorrt("getInferLibVersion"));
  const auto get_registry = reinterpret_cast<void* (*)()>(find_in_tensorrt("getPluginRegistry"));
  if (!get_version || !get_registry) return "no TensorRT library is loaded in this process: load it first";
  fa::trt::Registry registry(get_registry(), get_version());
  if (!registry.known()) return "this TensorRT's registry is unknown: expected version 10 or 11";
  void* library = dlopen(plugin_path().c_str(), RTLD_NOW);
  if (!library) return dlerror();
  using GetCreators = nvinfer1::IPluginCreatorInterface* const* (*)(int32_t&);
  const auto get_creators = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"));
  if (!get_creators) return "libfa_trt.so has no getCreators";
  int32_t num_creators = 0;
  nvinfer1::IPluginCreatorInterface* const* creators = get_creators(num_creators);
  for (int32_t i = 0; i < num_creators; ++i) {
    const auto* creator = static_cast<nvinfer1::IPluginCreatorV3One*>(creators[i]);
    const char* space = creator->getPluginNamespace();
    if (registry.get_creator(creator->getPluginName(), creator->getPluginVersion(), space)) continue;
    if (!registry.register_creator(*creators[i], space)) return "TensorRT's registry refused the creator";
  }
  return nullptr;
}

__attribute__((constructor)) void on_load() {
  if (const char* reason = register_creators()) std::fprintf(stderr, "[faplugin] not registered with TensorRT: %s\n", reason);
}

}  // namespace
