// SPDX-License-Identifier: Apache-2.0
// Attributes from and to plugin fields. The ONNX parser passes an INT as kINT32, INTS as kINT32[n], a FLOAT as kFLOAT32, a STRING
// as kCHAR whose length counts the NUL, and its buffers die after createPlugin; Python users pass kINT64 and kFLOAT64 as well.
#include "fields.h"

#include <cstdint>
#include <cstring>
#include <limits>
#include <locale>
#include <sstream>

namespace fa::trt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

/// What the state holds besides the attributes.
struct PlanField {
  const char* name;
  int64_t PluginState::* value;
};
constexpr PlanField kPlanFields[] = {{"planned_compute_capability", &PluginState::planned_compute_capability},
                                     {"planned_num_sms", &PluginState::planned_num_sms},
                                     {"planned_shared_memory_bytes", &PluginState::planned_shared_memory_bytes},
                                     {"reserved_workspace_bytes", &PluginState::reserved_workspace_bytes}};

const char* name_of(PluginFieldType type) {
  switch (type) {
    case PluginFieldType::kFLOAT16:
      return "kFLOAT16";
    case PluginFieldType::kFLOAT32:
      return "kFLOAT32";
    case PluginFieldType::kFLOAT64:
      return "kFLOAT64";
    case PluginFieldType::kINT8:
      return "kINT8";
    case PluginFieldType::kINT16:
      return "kINT16";
    case PluginFieldType::kINT32:
      return "kINT32";
    case PluginFieldType::kINT64:
      return "kINT64";
    case PluginFieldType::kCHAR:
      return "kCHAR";
    case PluginFieldType::kBF16:
      return "kBF16";
    default:
      return "another type";
  }
}

Status wrong(const PluginField& field, const std::string& expected) {
  return {StatusCode::kInvalidArgument, std::string("attribute ") + field.name + " is " + name_of(field.type) + "[" +
                                            std::to_string(field.length) + "]" + (field.data ? "" : " without data") +
                                            ", expected " + expected};
}

int64_t integer_at(const PluginField& field, int32_t i) {
  if (field.type == PluginFieldType::kINT32) return static_cast<const int32_t*>(field.data)[i];
  return static_cast<const int64_t*>(field.data)[i];
}

bool is_integer(const PluginField& field) {
  return field.type == PluginFieldType::kINT32 || field.type == PluginFieldType::kINT64;
}

Status read(const PluginField& field, int64_t* value) {
  if (!is_integer(field) || field.length != 1 || !field.data) return wrong(field, "one kINT32 or kINT64");
  *value = integer_at(field, 0);
  return {};
}

Status read(const PluginField& field, std::vector<int64_t>* value) {
  const bool empty = field.length == 0;
  if (!is_integer(field) || field.length < 0 || (!field.data && !empty)) return wrong(field, "a list of kINT32 or kINT64");
  value->clear();
  for (int32_t i = 0; i < field.length; ++i) value->push_back(integer_at(field, i));
  return {};
}

Status read(const PluginField& field, float* value) {
  const bool is_float = field.type == PluginFieldType::kFLOAT32 || field.type == PluginFieldType::kFLOAT64;
  if (!is_float || field.length != 1 || !field.data) return wrong(field, "one kFLOAT32");
  *value = field.type == PluginFieldType::kFLOAT32 ? *static_cast<const float*>(field.data)
                                                   : static_cast<float>(*static_cast<const double*>(field.data));
  return {};
}

Status read(const PluginField& field, std::string* value) {
  const bool empty = field.length == 0;
  if (field.type != PluginFieldType::kCHAR || field.length < 0 || (!field.data && !empty)) return wrong(field, "kCHAR");
  std::string text(empty ? "" : static_cast<const char*>(field.data), static_cast<size_t>(field.length));
  if (!text.empty() && text.back() == '\0') text.pop_back();
  if (text.find('\0') != std::string::npos) return wrong(field, "a string without a NUL inside");
  *value = std::move(text);
  return {};
}

PluginField field_of(const char* name, const int64_t& value) { return {name, &value, PluginFieldType::kINT64, 1}; }
PluginField field_of(const char* name, const float& value) { return {name, &value, PluginFieldType::kFLOAT32, 1}; }
PluginField field_of(const char* name, const std::string& value) {
  return {name, value.c_str(), PluginFieldType::kCHAR, static_cast<int32_t>(value.size() + 1)};
}
PluginField field_of(const char* name, const std::vector<int64_t>& value) {
  return {name, value.data(), PluginFieldType::kINT64, static_cast<int32_t>(value.size())};
}

void write_value(std::ostream& out, const std::vector<int64_t>& values) {
  for (size_t i = 0; i < values.size(); ++i) out << (i ? "," : "") << values[i];
}
template <class Value>
void write_value(std::ostream& out, const Value& value) {
  out << value;
}

/// An engine has been planned for a whole GPU, or not at all: whatever else is there is damaged.
Status check_plan(const PluginState& state) {
  const bool is_planned = state.planned_compute_capability != 0;
  for (const PlanField& field : kPlanFields) {
    const bool may_be_0 = !is_planned || field.value == &PluginState::reserved_workspace_bytes;
    const int64_t value = state.*field.value,
                  most = field.value == &PluginState::reserved_workspace_bytes ? INT64_MAX : INT32_MAX;
    if (value < (may_be_0 ? 0 : 1) || value > most)
      return {StatusCode::kInvalidArgument, std::string(field.name) + " is " + std::to_string(value) + ": the engine is damaged"};
  }
  return {};
}

/// A field that would be left out of what is computed: of a user who has mistyped an attribute, or of an engine whose builder
/// knew more than this library does.
Status unknown(const PluginField& field, nvinfer1::TensorRTPhase phase) {
  if (phase == nvinfer1::TensorRTPhase::kRUNTIME)
    return {StatusCode::kInvalidArgument, std::string("the engine has a field '") + field.name +
                                              "' that this version of the plugin doesn't know; load the version that it was "
                                              "built with, or build it again"};
  std::string names;
#define FA_ATTRIBUTE(type, attribute, value, meaning) names += (names.empty() ? "" : ", ") + std::string(#attribute);
#include "fa/attributes.def"
#undef FA_ATTRIBUTE
  return {StatusCode::kInvalidArgument, std::string("there is no attribute '") + field.name + "'; expected some of " + names};
}

Status read_field(const PluginField& field, nvinfer1::TensorRTPhase phase, PluginState* state) {
#define FA_ATTRIBUTE(type, attribute, value, meaning) \
  if (std::strcmp(field.name, #attribute) == 0) return read(field, &state->attributes.attribute);
#include "fa/attributes.def"
#undef FA_ATTRIBUTE
  for (const PlanField& known : kPlanFields)
    if (std::strcmp(field.name, known.name) == 0) return read(field, &(state->*known.value));
  return unknown(field, phase);
}

}  // namespace

const nvinfer1::PluginFieldCollection* attribute_fields() {
  constexpr auto INT = PluginFieldType::kINT32;
  constexpr auto INTS = PluginFieldType::kINT32;
  constexpr auto FLOAT = PluginFieldType::kFLOAT32;
  constexpr auto STRING = PluginFieldType::kCHAR;
  static const PluginField fields[] = {
#define FA_ATTRIBUTE(type, name, value, meaning) PluginField{#name, nullptr, type, 1},
#include "fa/attributes.def"
#undef FA_ATTRIBUTE
  };
  static const nvinfer1::PluginFieldCollection collection{static_cast<int32_t>(sizeof(fields) / sizeof(fields[0])), fields};
  return &collection;
}

Status read_fields(const nvinfer1::PluginFieldCollection* fields, nvinfer1::TensorRTPhase phase, PluginState* state) {
  if (!fields || (fields->nbFields > 0 && !fields->fields)) {
    return {StatusCode::kInvalidArgument, "the field collection is null"};
  }
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    if (!fields->fields[i].name) return {StatusCode::kInvalidArgument, "a field has no name"};
    if (Status status = read_field(fields->fields[i], phase, state); !status.ok()) return status;
  }
  return check_plan(*state);
}

std::vector<PluginField> write_fields(const PluginState& state) {
  std::vector<PluginField> fields;
#define FA_ATTRIBUTE(type, name, value, meaning) fields.push_back(field_of(#name, state.attributes.name));
#include "fa/attributes.def"
#undef FA_ATTRIBUTE
  for (const PlanField& known : kPlanFields) fields.push_back(field_of(known.name, state.*known.value));
  std::vector<PluginField> filled;  // an empty list is its default and is left out: a field of length 0 is nobody's habit
  for (const PluginField& field : fields) {
    if (field.length > 0) filled.push_back(field);
  }
  return filled;
}

std::string describe(const plugin::Attributes& attributes) {
  std::ostringstream out;
  out.imbue(std::locale::classic());
  out.precision(std::numeric_limits<float>::max_digits10);
#define FA_ATTRIBUTE(type, name, value, meaning) \
  out << #name << '=';                           \
  write_value(out, attributes.name);             \
  out << ';';
#include "fa/attributes.def"
#undef FA_ATTRIBUTE
  return out.str();
}

}  // namespace fa::trt
