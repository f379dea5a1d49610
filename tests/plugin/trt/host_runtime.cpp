// SPDX-License-Identifier: Apache-2.0
// The runtime phase on a GPU: enqueue on streams of its own with a poisoned workspace of exactly the size asked for and canaries
// round every buffer, two contexts at once on two streams, CUDA-graph capture and replay with changed data. Outputs go to a file.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <thread>

#include "host.h"

namespace host {
namespace {

using nvinfer1::DataType;

constexpr size_t kCanaryBytes = 256;
constexpr int kCanary = 0xc5;
constexpr int kPoison = 0xff;  // NaN in every floating-point type

void require(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

/// Device memory of exactly `bytes`, filled with NaN, between two canaries.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    require(cudaMalloc(&base_, bytes + 2 * kCanaryBytes), "cudaMalloc");
    require(cudaMemset(base_, kCanary, bytes + 2 * kCanaryBytes), "cudaMemset");
    poison();
  }
  ~Buffer() { cudaFree(base_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  char* data() const { return static_cast<char*>(base_) + kCanaryBytes; }
  void poison() { require(cudaMemset(data(), kPoison, bytes_), "cudaMemset"); }
  void write(const char* from) { require(cudaMemcpy(data(), from, bytes_, cudaMemcpyHostToDevice), "cudaMemcpy"); }

  std::vector<char> read() const {
    std::vector<char> bytes(bytes_);
    require(cudaMemcpy(bytes.data(), data(), bytes_, cudaMemcpyDeviceToHost), "cudaMemcpy");
    return bytes;
  }

  bool canaries_intact() const {
    std::vector<char> all(bytes_ + 2 * kCanaryBytes);
    require(cudaMemcpy(all.data(), base_, all.size(), cudaMemcpyDeviceToHost), "cudaMemcpy");
    const auto intact = [](char byte) { return byte == static_cast<char>(kCanary); };
    return std::all_of(all.begin(), all.begin() + kCanaryBytes, intact) &&
           std::all_of(all.end() - kCanaryBytes, all.end(), intact);
  }

 private:
  void* base_ = nullptr;
  size_t bytes_;
};

using Buffers = std::vector<std::unique_ptr<Buffer>>;
using Bytes = std::vector<std::vector<char>>;

std::vector<const void*> inputs_of(const Buffers& buffers) {
  std::vector<const void*> pointers;
  for (const auto& buffer : buffers) pointers.push_back(buffer->data());
  return pointers;
}

std::vector<void*> outputs_of(const Buffers& buffers) {
  std::vector<void*> pointers;
  for (const auto& buffer : buffers) pointers.push_back(buffer->data());
  return pointers;
}

/// One execution context: its plugin object, stream, outputs and workspace.
class Context {
 public:
  Context(nvinfer1::IPluginV3* plugin, const Case& node, size_t workspace_bytes, Report& report)
      : plugin_(plugin, report, node.id + ": context"),
        inputs_(describe(node.inputs, 0)),
        outputs_(describe(node.outputs, 0)),
        workspace_(workspace_bytes) {
    require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    for (const TensorSpec& output : node.outputs) buffers_.push_back(std::make_unique<Buffer>(bytes_of(output, 0)));
  }
  ~Context() { cudaStreamDestroy(stream_); }

  bool begin() {
    const int32_t num_inputs = static_cast<int32_t>(inputs_.size()), num_outputs = static_cast<int32_t>(outputs_.size());
    return plugin_ && plugin_.runtime->onShapeChange(inputs_.data(), num_inputs, outputs_.data(), num_outputs) == 0;
  }

  bool enqueue(const Buffers& inputs) {
    const std::vector<const void*> in = inputs_of(inputs);
    const std::vector<void*> out = outputs_of(buffers_);
    return plugin_.runtime->enqueue(inputs_.data(), outputs_.data(), in.data(), out.data(), workspace_.data(), stream_) == 0;
  }

  /// Outputs and workspace poisoned, one enqueue, and the outputs; empty where enqueue failed.
  Bytes run(const Buffers& inputs) {
    poison();
    if (!enqueue(inputs)) return {};
    return results();
  }

  void poison() {
    for (const auto& buffer : buffers_) buffer->poison();
    workspace_.poison();
    require(cudaDeviceSynchronize(), "poisoning");
  }

  Bytes results() {
    require(cudaStreamSynchronize(stream_), "the kernel");
    Bytes bytes;
    for (const auto& buffer : buffers_) bytes.push_back(buffer->read());
    return bytes;
  }

  bool canaries_intact() const {
    bool intact = workspace_.canaries_intact();
    for (const auto& buffer : buffers_) intact = intact && buffer->canaries_intact();
    return intact;
  }

  cudaStream_t stream() const { return stream_; }

 private:
  Plugin plugin_;
  std::vector<nvinfer1::PluginTensorDesc> inputs_, outputs_;
  Buffers buffers_;
  Buffer workspace_;
  cudaStream_t stream_ = nullptr;
};

/// The query with the sign of every number turned: other data of the same shape.
std::vector<char> negated(const TensorSpec& tensor, std::vector<char> bytes) {
  const size_t size = size_of(tensor.type);
  for (size_t i = size - 1; i < bytes.size(); i += size) bytes[i] = static_cast<char>(bytes[i] ^ 0x80);
  return bytes;
}

/// One case on the GPU with one tactic.
class RuntimeDriver {
 public:
  RuntimeDriver(const Source& source, const Case& node, std::istream& data, Report& report)
      : source_(source), node_(node), report_(report) {
    for (const TensorSpec& input : node.inputs) {
      std::vector<char> bytes(bytes_of(input, 0));
      data.seekg(input.data_offset);
      data.read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
      if (!data) throw std::runtime_error(node.id + ": the data file is too short");
      values_.push_back(std::move(bytes));
      inputs_.push_back(std::make_unique<Buffer>(values_.back().size()));
      inputs_.back()->write(values_.back().data());
    }
  }

  /// The outputs; empty where a step failed. A forced kernel (tactic > 0) may refuse the problem.
  Bytes run(Serialized& serialized, int32_t tactic) {
    name_ = node_.id + ", tactic " + std::to_string(tactic) + ": ";
    Plugin plugin(source_.creator->createPlugin(node_.id.c_str(), serialized.fields.get(), nvinfer1::TensorRTPhase::kRUNTIME),
                  report_, name_ + "createPlugin");
    if (!plugin || !report_.check(plugin.runtime->setTactic(tactic) == 0, name_ + "setTactic")) return {};
    const size_t workspace_bytes = workspace_of(plugin, node_, 0);
    if (tactic == 0) report_.check(workspace_bytes == serialized.workspace_bytes[0], name_ + "the workspace is as at the build");
    Context first(plugin.runtime->attachToContext(nullptr), node_, workspace_bytes, report_);
    Context second(plugin.runtime->attachToContext(nullptr), node_, workspace_bytes, report_);
    if (!report_.check(first.begin() && second.begin(), name_ + "onShapeChange")) return {};
    const Bytes outputs = first.run(inputs_);
    if (outputs.empty()) {
      report_.check(tactic > 0, name_ + "enqueue");
      report_.check(cudaDeviceSynchronize() == cudaSuccess, name_ + "a refused enqueue leaves no CUDA error");
      return {};
    }
    check_both(first, second, outputs);
    check_graph(first, outputs);
    report_.check(first.canaries_intact() && second.canaries_intact(), name_ + "canaries round outputs and workspace are intact");
    check_inputs();
    report_.check(cudaGetLastError() == cudaSuccess, name_ + "no CUDA error is left");
    return outputs;
  }

  size_t num_short() const { return num_short_; }

  /// The outputs of an engine that was built on an A100, in exactly the memory that it reserved there.
  Bytes run_foreign(Serialized& serialized) {
    name_ = node_.id + ", built on an A100: ";
    FieldSet fields(*serialized.fields.get());
    if (!report_.check(plan_for(&fields, 80), name_ + "the GPU that was planned for is serialised")) return {};
    const size_t bytes = workspace_of(create(fields), node_, 0);
    if (!report_.check(fields.set("reserved_workspace_bytes", static_cast<int64_t>(bytes)), name_ + "the reserve is serialised"))
      return {};
    Plugin plugin = create(fields);
    Context context(plugin.runtime->attachToContext(nullptr), node_, bytes, report_);
    if (!report_.check(context.begin(), name_ + "onShapeChange")) return {};
    const Bytes outputs = context.run(inputs_);
    const bool is_float8 = node_.inputs[0].type == nvinfer1::DataType::kFP8;  // which no kernel for an A100 takes
    report_.check(outputs.empty() == is_float8, name_ + (is_float8 ? "enqueue is refused" : "enqueue"));
    report_.check(context.canaries_intact(), name_ + "canaries round outputs and workspace are intact");
    if (outputs.empty()) report_.check(cudaDeviceSynchronize() == cudaSuccess, name_ + "a refused enqueue leaves no CUDA error");
    if (bytes > 0 && !outputs.empty()) check_short(fields, bytes);
    return outputs;
  }

 private:
  Plugin create(FieldSet& fields) {
    return Plugin(source_.creator->createPlugin(node_.id.c_str(), fields.get(), nvinfer1::TensorRTPhase::kRUNTIME), report_,
                  name_ + "createPlugin");
  }

  /// An engine that reserved a byte too few is refused by the plugin, and nothing is written.
  void check_short(FieldSet& fields, size_t bytes) {
    fields.set("reserved_workspace_bytes", static_cast<int64_t>(bytes) - 1);
    Plugin plugin = create(fields);
    Context context(plugin.runtime->attachToContext(nullptr), node_, bytes, report_);
    if (!report_.check(context.begin(), name_ + "onShapeChange, a byte short")) return;
    context.poison();
    const Bytes before = context.results();
    report_.check(!context.enqueue(inputs_), name_ + "a workspace that is short by a byte is refused");
    report_.check(context.results() == before, name_ + "a refused enqueue writes nothing");
    report_.check(cudaGetLastError() == cudaSuccess, name_ + "a refused enqueue leaves no CUDA error");
    ++num_short_;
  }

  /// Both contexts at once, each from a thread and on a stream of its own, several times: the outputs stay bitwise the same.
  void check_both(Context& first, Context& second, const Bytes& expected) {
    bool same[2] = {true, true};
    Context* contexts[2] = {&first, &second};
    std::vector<std::thread> threads;
    for (int i = 0; i < 2; ++i) {
      threads.emplace_back([&, i] {
        for (int round = 0; round < 3; ++round) same[i] = contexts[i]->run(inputs_) == expected && same[i];
      });
    }
    for (std::thread& thread : threads) thread.join();
    report_.check(same[0] && same[1], name_ + "two contexts on two streams give the same outputs");
  }

  /// enqueue captured into a graph after a warm-up; the replay must see the data of then, not of the capture.
  void check_graph(Context& context, const Bytes& expected) {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    require(cudaStreamBeginCapture(context.stream(), cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
    const bool enqueued = context.enqueue(inputs_);
    const cudaError_t ended = cudaStreamEndCapture(context.stream(), &graph);
    if (!report_.check(enqueued && ended == cudaSuccess && graph, name_ + "enqueue is captured in a graph",
                       cudaGetErrorString(ended))) {
      cudaGetLastError();
      return;
    }
    require(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
    const auto replay = [&] {
      context.poison();
      require(cudaGraphLaunch(executable, context.stream()), "cudaGraphLaunch");
      return context.results();
    };
    report_.check(replay() == expected, name_ + "the graph's replay gives the same outputs");
    inputs_[0]->write(negated(node_.inputs[0], values_[0]).data());
    const Bytes changed = context.run(inputs_);
    report_.check(replay() == changed, name_ + "the graph's replay sees changed data");
    inputs_[0]->write(values_[0].data());
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
  }

  void check_inputs() {
    for (size_t i = 0; i < inputs_.size(); ++i) {
      report_.check(inputs_[i]->read() == values_[i] && inputs_[i]->canaries_intact(),
                    name_ + "input " + std::to_string(i) + " is not written to");
    }
  }

  const Source& source_;
  const Case& node_;
  Report& report_;
  std::string name_;
  size_t num_short_ = 0;
  Bytes values_;
  Buffers inputs_;
};

/// Tactics that the plugin knows: 0, and one for each kernel that can be forced.
int32_t count_tactics(const Source& source, const Case& node) {
  FieldSet fields(node, FieldSet::Ints::kInt32);
  Report unused;
  Plugin plugin(source.creator->createPlugin("probe", fields.get(), nvinfer1::TensorRTPhase::kRUNTIME), unused, "probe");
  int32_t count = 0;
  while (plugin && count < 100 && plugin.runtime->setTactic(count) == 0) ++count;
  return count;
}

void write_outputs(std::ostream& file, const Bytes& outputs) {
  int64_t num_bytes = outputs.empty() ? -1 : 0;
  for (const std::vector<char>& bytes : outputs) num_bytes += static_cast<int64_t>(bytes.size());
  file.write(reinterpret_cast<const char*>(&num_bytes), sizeof num_bytes);
  for (const std::vector<char>& bytes : outputs) file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

}  // namespace

void drive_runtime(const Source& source, const std::vector<Case>& cases, const std::string& data_path,
                   const std::string& output_path, Report& report) {
  std::ifstream data(data_path, std::ios::binary);
  std::ofstream output(output_path, std::ios::binary);
  if (!data || !output) throw std::runtime_error("can't open " + (data ? output_path : data_path));
  const int32_t num_tactics = cases.empty() ? 0 : count_tactics(source, cases[0]);
  output.put(static_cast<char>(num_tactics + 1));
  std::vector<size_t> num_run(static_cast<size_t>(num_tactics) + 1);
  size_t num_with_workspace = 0, num_short = 0;
  for (const Case& node : cases) {
    const std::unique_ptr<Serialized> serialized = drive_build(source, node, report);
    if (!serialized) throw std::runtime_error(node.id + ": the build phase failed");
    num_with_workspace += serialized->workspace_bytes[0] > 0;
    RuntimeDriver driver(source, node, data, report);
    for (int32_t tactic = 0; tactic < num_tactics; ++tactic) {
      const Bytes outputs = driver.run(*serialized, tactic);
      num_run[static_cast<size_t>(tactic)] += !outputs.empty();
      write_outputs(output, outputs);
    }
    const Bytes outputs = driver.run_foreign(*serialized);
    num_run.back() += !outputs.empty();
    num_short += driver.num_short();
    write_outputs(output, outputs);
  }
  if (!output.flush()) throw std::runtime_error("can't write " + output_path);
  std::printf("%zu cases, %zu with a workspace\n", cases.size(), num_with_workspace);
  std::printf("refused %zu workspaces that were short by a byte\n", num_short);
  for (size_t tactic = 0; tactic < num_run.size(); ++tactic) std::printf("tactic %zu ran %zu cases\n", tactic, num_run[tactic]);
}

}  // namespace host
