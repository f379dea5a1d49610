// SPDX-License-Identifier: Apache-2.0
// Command line of the conformance host:
//   fa_trt_host --plugin libfa_trt.so --cases FILE [--tensorrt libnvinfer…] [--threads N]
//               [--gpu --data FILE --output FILE] [--registrar]
// Exit status: 0 all checks passed, 1 some failed, 2 it could not begin.
#include "host.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <map>
#include <stdexcept>
#include <thread>

#include "registry_abi.h"

namespace host {

bool Report::check(bool ok, const std::string& what, const std::string& detail) {
  const std::lock_guard<std::mutex> lock(mutex_);
  ++num_checks_;
  if (!ok) {
    ++num_failures_;
    std::printf("FAIL %s%s%s\n", what.c_str(), detail.empty() ? "" : ": ", detail.c_str());
    std::fflush(stdout);
  }
  return ok;
}

int Report::print_summary() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::printf("%lld checks, %lld failures\n", static_cast<long long>(num_checks_), static_cast<long long>(num_failures_));
  return num_failures_ == 0 && num_checks_ > 0 ? 0 : 1;
}

namespace {

/// The capability of this type, if it names itself so. A wrong cast gives an object that says something else, or nothing
/// sensible.
template <class Capability>
Capability* capability(nvinfer1::IPluginV3* plugin, nvinfer1::PluginCapabilityType type, const char* kind, Report& report,
                       const std::string& where) {
  nvinfer1::IPluginCapability* found = plugin->getCapabilityInterface(type);
  if (!report.check(found != nullptr, where + ": capability " + kind, "null")) return nullptr;
  const nvinfer1::InterfaceInfo info = found->getInterfaceInfo();
  const bool same = info.kind && std::strcmp(info.kind, kind) == 0 && info.major >= 1;
  if (!report.check(same, where + ": capability " + kind, std::string("it says it is ") + (info.kind ? info.kind : "null"))) {
    return nullptr;
  }
  return static_cast<Capability*>(found);
}

}  // namespace

Plugin::Plugin(nvinfer1::IPluginV3* plugin, Report& report, const std::string& where) : plugin_(plugin) {
  if (!report.check(plugin != nullptr, where, "null plugin")) return;
  const nvinfer1::InterfaceInfo info = plugin->getInterfaceInfo();
  report.check(std::strcmp(info.kind, "PLUGIN") == 0 && info.major == 1, where + ": kind of the plugin", info.kind);
  using Type = nvinfer1::PluginCapabilityType;
  core = capability<nvinfer1::IPluginV3OneCore>(plugin, Type::kCORE, "PLUGIN_V3ONE_CORE", report, where);
  build = capability<nvinfer1::IPluginV3OneBuild>(plugin, Type::kBUILD, "PLUGIN_V3ONE_BUILD", report, where);
  runtime = capability<nvinfer1::IPluginV3OneRuntime>(plugin, Type::kRUNTIME, "PLUGIN_V3ONE_RUNTIME", report, where);
}

namespace {

using Options = std::map<std::string, std::string>;

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word.rfind("--", 0) != 0) throw std::runtime_error("unexpected argument " + word);
    const bool has_value = i + 1 < argc && std::strncmp(argv[i + 1], "--", 2) != 0;
    options[word.substr(2)] = has_value ? argv[++i] : "";
  }
  for (const char* required : {"plugin", "cases"}) {
    if (!options.count(required)) throw std::runtime_error(std::string("--") + required + " is missing");
  }
  return options;
}

void* open_library(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
  if (!library) throw std::runtime_error(dlerror());
  return library;
}

template <class Function>
Function find(void* library, const char* symbol) {
  void* found = dlsym(library, symbol);
  if (!found) throw std::runtime_error(std::string("no symbol ") + symbol);
  return reinterpret_cast<Function>(found);
}

/// The creator out of the library itself.
nvinfer1::IPluginCreatorInterface* creator_of_library(const std::string& path) {
  void* library = open_library(path);
  find<void (*)(void*)>(library, "setLoggerFinder")(nullptr);
  int32_t num_creators = 0;
  using GetCreators = nvinfer1::IPluginCreatorInterface* const* (*)(int32_t&);
  nvinfer1::IPluginCreatorInterface* const* creators = find<GetCreators>(library, "getCreators")(num_creators);
  return num_creators == 1 ? creators[0] : nullptr;
}

/// The creator out of a real registry, which has opened the plugin's library; or, with `load` false, which a registrar has
/// filled.
nvinfer1::IPluginCreatorInterface* creator_of_registry(const Source& source, bool load, Report& report) {
  void* tensorrt = open_library(source.tensorrt_path);
  const int32_t version = find<int32_t (*)()>(tensorrt, "getInferLibVersion")();
  fa::trt::Registry registry(find<void* (*)()>(tensorrt, "getPluginRegistry")(), version);
  if (!registry.known()) throw std::runtime_error("the registry of TensorRT version " + std::to_string(version) + " is unknown");
  std::printf("registry of TensorRT %d.%d.%d\n", version / 10000, version / 100 % 100, version % 100);
  if (load) {
    void* handle = registry.load_library(source.plugin_path.c_str());
    report.check(handle != nullptr, "registry: loadLibrary", source.plugin_path);
    report.check(registry.load_library(source.plugin_path.c_str()) == nullptr, "registry: loadLibrary a second time is refused");
    registry.deregister_library(handle);
    report.check(!registry.get_creator("FlashAttention", "1", ""), "registry: no creator after deregisterLibrary");
    report.check(registry.load_library(source.plugin_path.c_str()) != nullptr, "registry: loadLibrary after deregisterLibrary");
  } else {
    open_library(source.plugin_path);
  }
  report.check(!registry.get_creator("FlashAttention", "2", ""), "registry: no creator of version 2");
  return registry.get_creator("FlashAttention", "1", "");
}

nvinfer1::IPluginCreatorV3One* find_creator(const Source& source, bool load, Report& report) {
  nvinfer1::IPluginCreatorInterface* creator =
      source.tensorrt_path.empty() ? creator_of_library(source.plugin_path) : creator_of_registry(source, load, report);
  if (!report.check(creator != nullptr, "a creator FlashAttention 1")) return nullptr;
  const nvinfer1::InterfaceInfo info = creator->getInterfaceInfo();
  report.check(std::strcmp(info.kind, "PLUGIN CREATOR_V3ONE") == 0 && info.major == 1, "kind of the creator", info.kind);
  return static_cast<nvinfer1::IPluginCreatorV3One*>(creator);
}

/// Every case through build and deserialisation, several at once: plugin objects share nothing that needs a lock.
void drive_all(const Source& source, const std::vector<Case>& cases, int num_threads, Report& report) {
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i = next++; i < cases.size(); i = next++) {
      if (const auto serialized = drive_build(source, cases[i], report)) {
        drive_deserialization(source, cases[i], *serialized, report);
      }
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < num_threads; ++i) threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();
}

int run(int argc, char** argv) {
  Options options = parse(argc, argv);
  Report report;
  Source source{options["plugin"], options["tensorrt"]};
  const std::vector<Case> cases = read_cases(options["cases"]);
  const bool load = !options.count("registrar");
  if (source.tensorrt_path.empty()) check_library(source, report);
  source.creator = find_creator(source, load, report);
  if (!source.creator) return report.print_summary();
  check_creator(source, cases, report);
  check_planned_devices(report);
  drive_all(source, cases, options.count("threads") ? std::stoi(options["threads"]) : 4, report);
  if (options.count("gpu")) drive_runtime(source, cases, options["data"], options["output"], report);
  return report.print_summary();
}

}  // namespace
}  // namespace host

int main(int argc, char** argv) {
  try {
    return host::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "fa_trt_host: %s\n", error.what());
    return 2;
  }
}
