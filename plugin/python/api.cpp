// SPDX-License-Identifier: Apache-2.0
// The C functions of libfa_python.so (api.h): a BoundCall without exceptions.
#include "api.h"

#include <algorithm>
#include <memory>
#include <new>

#include "exchange.h"

namespace fa::plugin {
namespace {

thread_local std::string last_error, last_text;

/// Runs `work` and makes its exception an error of the calling thread.
template <class Work>
FaError guarded(const Work& work) {
  try {
    work();
    return kFaOk;
  } catch (const Error& error) {
    last_error = error.what();
    return error.kind;
  } catch (const std::bad_alloc&) {
    last_error = "out of memory";
    return kFaMemoryError;
  } catch (const std::exception& error) {
    last_error = error.what();
    return kFaRuntimeError;
  }
}

void assign(const FaAttribute& given, int64_t* field) { *field = given.integer; }
void assign(const FaAttribute& given, float* field) { *field = static_cast<float>(given.number); }
void assign(const FaAttribute& given, std::string* field) { field->assign(given.text, given.length); }
void assign(const FaAttribute& given, std::vector<int64_t>* field) {
  field->assign(given.integers, given.integers + given.length);
}

Attributes attributes_from(const FaAttribute* given, size_t count) {
  Attributes attributes;
  for (size_t i = 0; i < count; ++i) {
    int row = 0;
#define FA_ATTRIBUTE(type, name, value, meaning) \
  if (given[i].index == row++) assign(given[i], &attributes.name);
#include "fa/attributes.def"
#undef FA_ATTRIBUTE
  }
  return attributes;
}

/// Null where the name is empty.
const char* kernel_named(const char* name) { return *name == '\0' ? nullptr : name; }

struct Row {
  const char* name;
  const char* type;
};
constexpr Row kAttributes[] = {
#define FA_ATTRIBUTE(type, name, value, meaning) {#name, #type},
#include "fa/attributes.def"
#undef FA_ATTRIBUTE
};
constexpr int kNumAttributes = sizeof(kAttributes) / sizeof(kAttributes[0]);

}  // namespace
}  // namespace fa::plugin

using namespace fa::plugin;

const char* fa_python_interface() { return FA_PYTHON_INTERFACE; }

const char* fa_python_error() { return last_error.c_str(); }

const char* fa_python_input(int32_t index) { return index < kNumInputs ? name_of(static_cast<Input>(index)) : nullptr; }

const char* fa_python_attribute(int32_t index, const char** type) {
  if (index >= kNumAttributes) return nullptr;
  *type = kAttributes[index].type;
  return kAttributes[index].name;
}

FaError fa_python_set_device(int32_t ordinal, int32_t* previous) {
  return guarded([&] {
    if (const fa::Status status = exchange_cuda_device(ordinal, previous); !status.ok())
      throw Error(kFaRuntimeError, status.sentence);
  });
}

FaError fa_python_node_new(const FaAttribute* attributes, size_t num_attributes, Node** node) {
  return guarded([&] {
    auto made = std::make_unique<Node>();
    check(make_node(attributes_from(attributes, num_attributes), made.get()));
    *node = made.release();
  });
}

void fa_python_node_delete(Node* node) { delete node; }

FaError fa_python_call_new(const Node* node, const FaArray* inputs, size_t num_inputs, uintptr_t stream, BoundCall** call,
                           FaOutput* outputs, size_t* num_outputs, int32_t* is_cuda) {
  return guarded([&] {
    auto made = std::make_unique<BoundCall>(*node, inputs, num_inputs, stream);
    made->validate();
    const std::vector<FaOutput> found = made->outputs();
    std::copy(found.begin(), found.end(), outputs);
    *num_outputs = found.size();
    *is_cuda = made->is_cuda();
    *call = made.release();
  });
}

void fa_python_call_delete(BoundCall* call) { delete call; }

FaError fa_python_call_prepare(BoundCall* call, const FaArray* outputs, size_t num_outputs, const char* kernel,
                               size_t* workspace_bytes) {
  return guarded([&] { *workspace_bytes = call->prepare(outputs, num_outputs, kernel_named(kernel)); });
}

FaError fa_python_call_prepare_backward(BoundCall* call, const FaArray* arrays, size_t* workspace_bytes, const char* kernel) {
  return guarded([&] { *workspace_bytes = call->prepare_backward(arrays, kernel_named(kernel)); });
}

FaError fa_python_call_run(BoundCall* call, void* workspace, size_t workspace_bytes, int64_t num_threads) {
  return guarded([&] { call->run(workspace, workspace_bytes, num_threads); });
}

FaError fa_python_call_explain(const BoundCall* call, const char* device, const char** text) {
  return guarded([&] {
    last_text = call->explain(device);
    *text = last_text.c_str();
  });
}

int32_t fa_python_exchange_known(const dlpack::ExchangeApi* api) {
  return api->version.major == 1 && api->allocate != nullptr && api->tensor_from_object != nullptr &&
         api->current_stream != nullptr;
}

int64_t fa_python_exchange_begin(const FaObjectCall* given) {
  ObjectCall* remaining = nullptr;
  const FaError error = guarded([&] {
    auto made = std::make_unique<ObjectCall>(*given);
    if (made->is_cuda())
      made->run(0);
    else
      remaining = made.release();
  });
  return error == kFaOk ? reinterpret_cast<intptr_t>(remaining) : -error;
}

FaError fa_python_exchange_run(ObjectCall* call, int64_t num_threads) {
  return guarded([&] { std::unique_ptr<ObjectCall>(call)->run(num_threads); });
}
