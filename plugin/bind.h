// SPDX-License-Identifier: Apache-2.0
// From a node (attributes, tensors) to fa::StepParams: the only place where layouts, packed columns, mask broadcasting,
// ONNX's diagonal, the cache and defaults are converted (docs/operator.md). Called by the ONNX Runtime, TensorRT and Python
// adapters; knows none of them. Nothing here throws but std::bad_alloc; all functions are thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "fa/attention.h"

namespace fa::plugin {

using fa::name_of;
using fa::size_of;

/// Inputs of FlashAttention. The first three are always there, the others where `optional_inputs` names them.
enum class Input : uint8_t {
#define FA_INPUT(identifier, name, dtypes, shape, meaning) identifier,
#include "fa/inputs.def"
#undef FA_INPUT
};
#define FA_INPUT(identifier, name, dtypes, shape, meaning) +1
inline constexpr int kNumInputs = 0
#include "fa/inputs.def"
    ;
#undef FA_INPUT
const char* name_of(Input input);

/// Outputs of FlashAttention. The first is always there, the others where `optional_outputs` names them.
enum class Output : uint8_t { kOutput, kPresentKey, kPresentValue, kLse };
inline constexpr int kNumOutputs = 4;
const char* name_of(Output output);

/// An error of a node or of its tensors, in a sentence that names what is wrong, what it is and what is expected.
inline Status invalid(std::string sentence) { return {StatusCode::kInvalidArgument, std::move(sentence)}; }

/// One field for each row of attributes.def, with its default.
struct Attributes {
#define FA_FIELD_INT(name, value) int64_t name = value;
#define FA_FIELD_FLOAT(name, value) float name = value;
#define FA_FIELD_STRING(name, value) std::string name = value;
#define FA_FIELD_INTS(name, value) std::vector<int64_t> name;
#define FA_ATTRIBUTE(type, name, value, meaning) FA_FIELD_##type(name, value)
#include "fa/attributes.def"
#undef FA_ATTRIBUTE
#undef FA_FIELD_INT
#undef FA_FIELD_FLOAT
#undef FA_FIELD_STRING
#undef FA_FIELD_INTS
};

enum class Layout : uint8_t { kBHSD, kBSHD, kBSH };
enum class Alignment : uint8_t { kOnnx, kTopLeft, kBottomRight };

/// Attributes that are words, read once, so that a call compares no text.
struct Words {
  std::optional<Layout> query, key, value, output;  // none: as ranks say; the output as the query
  Layout cache_layout = Layout::kBHSD;
  CacheMode cache = CacheMode::kAppend;
  Alignment alignment = Alignment::kOnnx;
  bool empty_rows_are_means = false;
  Float32Precision float32_precision = Float32Precision::kTf32x3;
};

/// A node whose attributes are checked: what it is given and what it returns, in the order of its slots, without holes. Made by
/// make_node().
struct Node {
  Attributes attributes;
  Words words;
  std::vector<Input> inputs;
  std::vector<Output> outputs;
  int input_slots[kNumInputs] = {};    // places in inputs, -1 where absent
  int output_slots[kNumOutputs] = {};  // places in outputs, likewise

  int slot(Input input) const { return input_slots[static_cast<int>(input)]; }
  int slot(Output output) const { return output_slots[static_cast<int>(output)]; }
};

/// Checks each attribute's value and the names in optional_inputs and optional_outputs. Once for a node, before any tensor.
Status make_node(const Attributes& attributes, Node* node);

/// What the node asks for that the TensorRT plugin doesn't offer yet, in its own words; "": nothing.
std::string missing_in_tensorrt(const Node& node);

/// Has a node so many inputs?
Status check_num_inputs(const Node& node, size_t count);
/// May `input` have this dtype beside a query of dtype `query`?
bool accepts(Input input, DType dtype, DType query);
/// The same as an error that says what it may have. No dtype: one that the operator has nowhere.
Status check_dtype(Input input, std::optional<DType> dtype, DType query);
/// Does the attribute output_dtype go with a query of this dtype?
Status check_output_dtype(const Node& node, DType query);
/// The dtype of an output beside a query of dtype `query` and a past of dtype `cache` (the query's where there is no past).
DType dtype_of(const Node& node, Output output, DType query, DType cache);

/// A tensor as a runtime hands it over. `data` may be null where only a plan is made.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int rank = 0;            // beyond 4 the tensor is refused, whatever shape says
  int64_t shape[4] = {};   // the first `rank`
  int64_t stride[4] = {};  // in elements
};

/// A row-major tensor.
Tensor contiguous(void* data, DType dtype, const int64_t* shape, size_t rank);

/// A call, complete but for the memory of its outputs and its workspace.
struct Problem {
  StepParams params;
  Tensor outputs[kNumOutputs];      // shape, dtype; row-major. rank 0: not wanted
  bool in_workspace[2] = {};        // key, value: what attention reads is stored there, by params.cache, and no output
  TensorView fresh[2], present[2];  // key, value: an output that is a mere copy of the input, from there to there; else absent
};

/// Binds tensors (in the order of node.inputs) to a new problem. The sentence names the input, what it has and what is expected.
Status bind(const Node& node, const std::vector<Tensor>& inputs, Problem* problem);

/// Gives an output its memory (row-major, of the shape in problem.outputs).
void set_output(Problem* problem, Output output, void* data);

/// How a call is carried out on one device.
struct Plan {
  fa::Plan attention;
  size_t stored_bytes = 0;     // of workspace, in front of the kernel's own: Problem::in_workspace
  size_t workspace_bytes = 0;  // all of it; on the CPU too
};

/// Checks the call and chooses its kernel, the one called `kernel` where that is not null. After the outputs have their memory,
/// whose alignment counts; outputs without memory yet count as aligned.
Status plan(const Problem& problem, const Device& device, Plan* plan, const char* kernel = nullptr);

/// Memory that suffices for every problem of at most these sizes (batch, rows, keys), all else being equal.
size_t max_workspace_bytes(const Problem& largest, const Device& device);

/// Copies keys and values where asked, then stores new rows and computes attention. What lies in the workspace is given its place
/// in `problem`.
Status launch(const Plan& plan, Problem* problem, const ExecutionContext& context);

}  // namespace fa::plugin
