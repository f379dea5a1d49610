// SPDX-License-Identifier: Apache-2.0
// Attributes of a node: their values and the names in optional_inputs and optional_outputs, checked once when a runtime creates
// the node. What depends on tensors is bind.cpp's.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "bind.h"
#include "output_shape.h"

namespace fa::plugin {
namespace {

constexpr const char* kInputNames[kNumInputs] = {
#define FA_INPUT(identifier, name, dtypes, shape, meaning) #name,
#include "fa/inputs.def"
#undef FA_INPUT
};
constexpr const char* kOutputNames[kNumOutputs] = {"output", "present_key", "present_value", "lse"};

std::string quoted(const std::string& text) { return "'" + text + "'"; }

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> names;
  for (size_t begin = 0; begin < text.size();) {
    const size_t comma = std::min(text.find(',', begin), text.size());
    const size_t first = text.find_first_not_of(' ', begin);
    const size_t last = text.find_last_not_of(' ', comma - 1);
    names.push_back(first < comma ? text.substr(first, last - first + 1) : "");
    begin = comma + 1;
    if (comma + 1 == text.size()) names.push_back("");
  }
  return names;
}

/// Appends to `slots` what `list` names; `names` are the known ones, of which the first `num_required` are there anyway.
template <class Slot>
Status parse_slots(const char* attribute, const std::string& list, const char* const* names, int num_names, int num_required,
                   std::vector<Slot>* slots) {
  for (const std::string& name : split(list)) {
    const int index = static_cast<int>(std::find(names, names + num_names, name) - names);
    if (index < num_required || index == num_names) {
      std::string known;
      for (int i = num_required; i < num_names; ++i) known += (i > num_required ? ", " : "") + std::string(names[i]);
      return invalid(std::string(attribute) + " names " + quoted(name) + "; expected some of " + known);
    }
    const Slot slot = static_cast<Slot>(index);
    if (name != "unused" && std::find(slots->begin(), slots->end(), slot) != slots->end())
      return invalid(std::string(attribute) + " names " + quoted(name) + " twice");
    slots->push_back(slot);
  }
  return {};
}

Status check_word(const char* attribute, const std::string& value, std::initializer_list<const char*> words) {
  std::string expected;
  for (const char* word : words) {
    if (value == word) return {};
    if (*word) expected += (expected.empty() ? "" : ", ") + quoted(word);
  }
  return invalid(std::string(attribute) + " is " + quoted(value) + "; expected one of " + expected);
}

Status check_words(const Attributes& a) {
  if (Status s = check_word("alignment", a.alignment, {"onnx", "top_left", "bottom_right"}); !s.ok()) return s;
  if (Status s = check_word("empty_row", a.empty_row, {"zero", "mean"}); !s.ok()) return s;
  if (Status s = check_word("float32_precision", a.float32_precision, {"", "tf32", "tf32x3"}); !s.ok()) return s;
  if (Status s = check_word("output_dtype", a.output_dtype, {"", "float32", "float16", "bfloat16", "float8_e4m3fn"}); !s.ok())
    return s;
  if (Status s = check_word("cache", a.cache, {"append", "write", "window", "paged"}); !s.ok()) return s;
  const std::pair<const char*, const std::string&> layouts[] = {{"cache_layout", a.cache_layout},
                                                                {"query_layout", a.query_layout},
                                                                {"key_layout", a.key_layout},
                                                                {"value_layout", a.value_layout},
                                                                {"output_layout", a.output_layout}};
  for (const auto& [name, word] : layouts)
    if (Status s = check_word(name, word, {"", "BHSD", "BSHD", "BSH"}); !s.ok()) return s;
  return {};
}

Status check_at_least(const char* attribute, int64_t value, int64_t least) {
  if (value >= least) return {};
  return invalid(std::string(attribute) + " is " + std::to_string(value) + "; expected " + std::to_string(least) + " or more");
}

/// A number of heads or columns: 0 … 2^31 - 1, so that no product of two overflows.
Status check_count(const char* attribute, int64_t value) {
  constexpr int64_t kMost = INT32_MAX;
  if (value <= kMost) return check_at_least(attribute, value, 0);
  return invalid(std::string(attribute) + " is " + std::to_string(value) + "; expected " + std::to_string(kMost) + " at most");
}

Status check_numbers(const Attributes& a) {
  if (Status s = check_count("q_num_heads", a.q_num_heads); !s.ok()) return s;
  if (Status s = check_count("kv_num_heads", a.kv_num_heads); !s.ok()) return s;
  if (Status s = check_at_least("left_window_size", a.left_window_size, -1); !s.ok()) return s;
  if (Status s = check_at_least("right_window_size", a.right_window_size, -1); !s.ok()) return s;
  if (Status s = check_count("head_dim", a.head_dim); !s.ok()) return s;
  if (Status s = check_count("head_dim_v", a.head_dim_v); !s.ok()) return s;
  if (a.is_causal != 0 && a.is_causal != 1) return invalid("is_causal is " + std::to_string(a.is_causal) + "; expected 0 or 1");
  if (Status s = check_count("rotary_dim", a.rotary_dim); !s.ok()) return s;
  if (a.rotary_dim % 2 != 0) return invalid("rotary_dim is " + std::to_string(a.rotary_dim) + "; expected an even number");
  if (a.rotary_interleaved != 0 && a.rotary_interleaved != 1)
    return invalid("rotary_interleaved is " + std::to_string(a.rotary_interleaved) + "; expected 0 or 1");
  if (a.kv_cache_bit_width != 4 && a.kv_cache_bit_width != 8)
    return invalid("kv_cache_bit_width is " + std::to_string(a.kv_cache_bit_width) + "; expected 4 or 8");
  if (!std::isfinite(a.scale)) return invalid("scale is not a finite number");
  if (!std::isfinite(a.softcap) || a.softcap < 0)
    return invalid("softcap is " + std::to_string(a.softcap) + "; expected 0 or more");
  return {};
}

Status check_packed_columns(const Attributes& a) {
  if (a.packed_columns.empty()) return {};
  if (a.packed_columns.size() != 6)
    return invalid("packed_columns has " + std::to_string(a.packed_columns.size()) +
                   " numbers; expected 6: q_start, q_stride, k_start, k_stride, v_start, v_stride");
  for (const int64_t number : a.packed_columns)
    if (Status s = check_count("packed_columns", number); !s.ok()) return s;
  if (a.head_dim == 0) return invalid("packed_columns needs the attribute head_dim");
  return {};
}

/// What the modes of a cache need, and what has a meaning in some of them only.
Status check_cache(const Node& node) {
  const auto has = [&](Input input) { return node.slot(input) >= 0; };
  const std::string& mode = node.attributes.cache;
  const auto needs = [&](const char* what) { return invalid("cache = " + mode + " needs " + what); };
  const auto belongs = [](Input input, const char* what) { return invalid(std::string(name_of(input)) + " goes with " + what); };
  const bool paged = mode == "paged";
  if (mode == "append") {
    if (has(Input::kWriteIndices)) return belongs(Input::kWriteIndices, "cache = write, window or paged");
  } else {
    if (!has(Input::kPastKey)) return needs("past_key and past_value");
    if (!has(Input::kNonpadKvSeqlen) && !has(Input::kWriteIndices)) return needs("nonpad_kv_seqlen or write_indices");
  }
  if (paged && !has(Input::kBlockTable)) return needs("block_table");
  if (paged && !has(Input::kCuSeqlensQ)) return needs("cu_seqlens_q");
  if (!paged && has(Input::kBlockTable)) return belongs(Input::kBlockTable, "cache = paged");
  if (!paged && has(Input::kSlotMapping)) return belongs(Input::kSlotMapping, "cache = paged");
  if (mode != "write" && has(Input::kKvExtent)) return belongs(Input::kKvExtent, "cache = write");
  const bool windowed =
      node.attributes.left_window_size >= 0 && (node.attributes.is_causal || node.attributes.right_window_size == 0);
  if (mode == "window" && !windowed) return needs("left_window_size and is_causal");
  return {};
}

Status check_together(const Node& node) {
  const auto has = [&](Input input) { return node.slot(input) >= 0; };
  const auto refuse = [](Input a, Input b) {
    return invalid(std::string(name_of(a)) + " can't be given together with " + name_of(b));
  };
  const bool paged = node.attributes.cache == "paged";
  struct Need {
    Input input, other;
    bool applies = true;
  };
  const Need needs[] = {{Input::kPastKey, Input::kPastValue},
                        {Input::kPastValue, Input::kPastKey},
                        {Input::kCuSeqlensQ, Input::kCuSeqlensKv, !paged},
                        {Input::kCuSeqlensKv, Input::kCuSeqlensQ},
                        {Input::kCosCache, Input::kSinCache},
                        {Input::kSinCache, Input::kCosCache},
                        {Input::kPositionIds, Input::kCosCache},
                        {Input::kKScale, Input::kPastKey},
                        {Input::kVScale, Input::kPastValue}};
  for (const auto& [a, b, applies] : needs)
    if (applies && has(a) && !has(b)) return invalid(std::string(name_of(a)) + " needs " + name_of(b) + " beside it");
  const Need exclusive[] = {{Input::kCuSeqlensQ, Input::kPastKey, !paged}, {Input::kCuSeqlensQ, Input::kNonpadKvSeqlen, !paged},
                            {Input::kCuSeqlensKv, Input::kBlockTable},     {Input::kCuSeqlensQ, Input::kQueryLengths},
                            {Input::kQueryBias, Input::kCosCache},         {Input::kQueryBias, Input::kQNormWeight},
                            {Input::kQueryBias, Input::kKNormWeight}};
  for (const auto& [a, b, applies] : exclusive)
    if (applies && has(a) && has(b)) return refuse(a, b);
  if (has(Input::kEmptyRowValue) && node.attributes.empty_row != "zero")
    return invalid("empty_row is '" + node.attributes.empty_row +
                   "' and empty_row_value is there too; expected 'zero' beside it");
  if (!std::is_sorted(node.outputs.begin(), node.outputs.end()))
    return invalid("optional_outputs is '" + node.attributes.optional_outputs +
                   "'; expected the order present_key, present_value, lse");
  return check_cache(node);
}

/// Where each slot stands in `slots`, of the first if it does so twice; -1 where it doesn't.
template <class Slot, size_t kCount>
void fill_table(const std::vector<Slot>& slots, int (*table)[kCount]) {
  std::fill(*table, *table + kCount, -1);
  for (size_t i = slots.size(); i-- > 0;) (*table)[static_cast<int>(slots[i])] = static_cast<int>(i);
}

std::optional<Layout> layout_of(const std::string& word) {
  if (word.empty()) return std::nullopt;
  return word == "BSH" ? Layout::kBSH : word == "BSHD" ? Layout::kBSHD : Layout::kBHSD;
}

Words read_words(const Attributes& a) {
  Words words;
  words.query = layout_of(a.query_layout);
  words.key = layout_of(a.key_layout);
  words.value = layout_of(a.value_layout);
  words.output = layout_of(a.output_layout);
  words.cache_layout = layout_of(a.cache_layout).value_or(Layout::kBHSD);
  words.cache = a.cache == "write"    ? CacheMode::kWrite
                : a.cache == "window" ? CacheMode::kWindow
                : a.cache == "paged"  ? CacheMode::kPaged
                                      : CacheMode::kAppend;
  words.alignment = a.alignment == "onnx"       ? Alignment::kOnnx
                    : a.alignment == "top_left" ? Alignment::kTopLeft
                                                : Alignment::kBottomRight;
  words.empty_rows_are_means = a.empty_row == "mean";
  if (a.float32_precision == "tf32") words.float32_precision = Float32Precision::kTf32;
  return words;
}

Status resolve(Input input, std::optional<Layout> word, int rank, int64_t heads, bool packed, Layout* layout) {
  constexpr const char* kLayoutNames[] = {"BHSD", "BSHD", "BSH"};
  const auto wrong = [&](const std::string& what) { return invalid(std::string(name_of(input)) + " has rank " + what); };
  if (rank != 3 && rank != 4) return wrong(std::to_string(rank) + "; expected 3 or 4");
  *layout = word.value_or(rank == 3 ? Layout::kBSH : Layout::kBHSD);
  const int expected = *layout == Layout::kBSH ? 3 : 4;
  if (rank != expected)
    return wrong(std::to_string(rank) + "; expected " + std::to_string(expected) + " in layout " +
                 kLayoutNames[static_cast<int>(*layout)]);
  if (packed && rank != 3) return wrong("4; packed_columns expects 3");
  if (rank == 3 && heads == 0)
    return wrong(std::string("3 and needs the attribute ") + (input == Input::kQuery ? "q_num_heads" : "kv_num_heads"));
  return {};
}

}  // namespace

std::string missing_in_tensorrt(const Node& node) {
  if (node.attributes.cache != "append") return "cache = " + node.attributes.cache;
#define FA_NOT_IN_TENSORRT(identifier, name) \
  if (node.slot(Input::identifier) >= 0) return #name;
#include "fa/not_in_tensorrt.def"
#undef FA_NOT_IN_TENSORRT
  return "";
}

const char* name_of(Input input) { return kInputNames[static_cast<int>(input)]; }
const char* name_of(Output output) { return kOutputNames[static_cast<int>(output)]; }

Status make_node(const Attributes& attributes, Node* node) {
  *node = Node{};
  node->attributes = attributes;
  node->inputs = {Input::kQuery, Input::kKey, Input::kValue};
  node->outputs = {Output::kOutput};
  if (Status s = check_numbers(attributes); !s.ok()) return s;
  if (Status s = check_words(attributes); !s.ok()) return s;
  if (Status s = check_packed_columns(attributes); !s.ok()) return s;
  if (Status s = parse_slots("optional_inputs", attributes.optional_inputs, kInputNames, kNumInputs, 3, &node->inputs); !s.ok())
    return s;
  if (Status s = parse_slots("optional_outputs", attributes.optional_outputs, kOutputNames, kNumOutputs, 1, &node->outputs);
      !s.ok())
    return s;
  node->words = read_words(attributes);
  fill_table(node->inputs, &node->input_slots);
  fill_table(node->outputs, &node->output_slots);
  return check_together(*node);
}

Status resolve_layouts(const Node& node, int query_rank, int key_rank, int value_rank, Layouts* layouts) {
  const Attributes& a = node.attributes;
  const Words& words = node.words;
  const bool packed = !a.packed_columns.empty();
  if (Status s = resolve(Input::kQuery, words.query, query_rank, a.q_num_heads, packed, &layouts->query); !s.ok()) return s;
  if (Status s = resolve(Input::kKey, words.key, key_rank, a.kv_num_heads, packed, &layouts->key); !s.ok()) return s;
  if (Status s = resolve(Input::kValue, words.value, value_rank, a.kv_num_heads, packed, &layouts->value); !s.ok()) return s;
  layouts->cache = words.cache_layout;
  layouts->output = words.output.value_or(layouts->query);
  return {};
}

}  // namespace fa::plugin
