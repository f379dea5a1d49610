// SPDX-License-Identifier: Apache-2.0
// The functions of libfa_python.so and their data, in C: what faplugin/_native.py declares to ctypes, field by field. The library
// and the package are installed together, so this is no interface to others: the package refuses a library that another form of
// this file has made. Every function that returns a FaError sets the sentence of fa_python_error, which is the calling thread's.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dlpack.h"

namespace fa::plugin {
class BoundCall;
class ObjectCall;
struct Node;
}  // namespace fa::plugin

#pragma GCC visibility push(default)
extern "C" {

/// As which of Python's exceptions an error is raised.
enum FaError : int32_t { kFaOk, kFaValueError, kFaTypeError, kFaRuntimeError, kFaMemoryError };

/// What a NumPy array tells of itself in `__array_struct__` (PyArrayInterface in NumPy's documentation).
struct FaNumpyArray {
  int two;
  int rank;
  char kind;
  int item_size;
  int flags;
  intptr_t* shape;
  intptr_t* strides;  // in bytes
  void* data;
  void* description;
};

/// An array of Python's: an object of a type that has DLPack's C exchange API, a tensor of DLPack's, an array of NumPy's, or,
/// with none of these, a specification without memory.
struct FaArray {
  void* object;
  const fa::plugin::dlpack::ExchangeApi* api;  // of the object's type
  const fa::plugin::dlpack::DLManagedTensor* dlpack;
  const FaNumpyArray* numpy;
  const char* dtype;  // as NumPy writes it; not read with an object or dlpack
  int32_t rank;       // of a specification; beyond 4 it is refused
  int64_t shape[4];   // likewise
};

/// An attribute: `index` is its row of attributes.def, whose type says which of the fields is read.
struct FaAttribute {
  int32_t index;
  int64_t integer;
  double number;
  const char* text;
  const int64_t* integers;
  size_t length;  // of text or integers
};

/// What a call returns; row-major.
struct FaOutput {
  const char* name;
  const char* dtype;
  int32_t rank;
  int64_t shape[4];
};

/// The arrays of a backward pass, each in the shape and dtype that the forward's array of that name has; d_bias and d_sinks are
/// float32. One that is absent (no object, dlpack, numpy or dtype) is not given or not wanted; d_lse, d_bias and d_sinks may be.
enum FaGradient : int32_t {
  kFaOutput,
  kFaLse,
  kFaDOutput,
  kFaDLse,
  kFaDQuery,
  kFaDKey,
  kFaDValue,
  kFaDBias,
  kFaDSinks,
  kFaNumGradients
};

/// A call on objects of the type that has the exchange API. The objects follow this struct: the node's inputs, then its outputs
/// or, for a backward pass, the arrays by FaGradient; one that is absent is `none`, Python's None.
struct FaObjectCall {
  const fa::plugin::Node* node;
  const fa::plugin::dlpack::ExchangeApi* api;
  void* none;
  size_t num_inputs;
  size_t num_others;
  size_t is_backward;
};

/// Which form of this file the library was compiled from: the first 16 digits of its SHA-256.
const char* fa_python_interface();
/// The sentence of this thread's last error.
const char* fa_python_error();
/// The names in inputs.def, in order; null behind the last.
const char* fa_python_input(int32_t index);
/// The name and the type (INT, FLOAT, STRING, INTS) of a row of attributes.def; null behind the last.
const char* fa_python_attribute(int32_t index, const char** type);
/// Makes a CUDA device current and tells which one was.
FaError fa_python_set_device(int32_t ordinal, int32_t* previous);

/// The operator with its attributes, checked. It must outlive its calls.
FaError fa_python_node_new(const FaAttribute* attributes, size_t num_attributes, fa::plugin::Node** node);
void fa_python_node_delete(fa::plugin::Node* node);

/// Binds a call to its inputs, whose memory must outlive it; fills `outputs` (room for 4) and their number. This and the next two
/// are called with the interpreter's lock; where an object can't be read, its exception is set there.
FaError fa_python_call_new(const fa::plugin::Node* node, const FaArray* inputs, size_t num_inputs, uintptr_t stream,
                           fa::plugin::BoundCall** call, FaOutput* outputs, size_t* num_outputs, int32_t* is_cuda);
void fa_python_call_delete(fa::plugin::BoundCall* call);
/// Binds the outputs' memory and chooses the kernel, the one called `kernel` where that is not empty.
FaError fa_python_call_prepare(fa::plugin::BoundCall* call, const FaArray* outputs, size_t num_outputs, const char* kernel,
                               size_t* workspace_bytes);
/// In place of prepare, for a call whose optional_outputs are 'lse': run() computes gradients then, by the kernel called `kernel`
/// where that is not empty. `arrays` by FaGradient.
FaError fa_python_call_prepare_backward(fa::plugin::BoundCall* call, const FaArray* arrays, size_t* workspace_bytes,
                                        const char* kernel);
/// After prepare, without the interpreter's lock. `workspace` may be null: what is needed is allocated then, in the order of the
/// stream.
FaError fa_python_call_run(fa::plugin::BoundCall* call, void* workspace, size_t workspace_bytes, int64_t num_threads);
/// `text` is valid until this thread's next call of this function.
FaError fa_python_call_explain(const fa::plugin::BoundCall* call, const char* device, const char** text);

/// Can the functions below be used with it?
int32_t fa_python_exchange_known(const fa::plugin::dlpack::ExchangeApi* api);
/// Begins a call. On CUDA that launches it, and 0 is returned; on the CPU the ObjectCall that remains to be run; a FaError with a
/// minus. With the interpreter's lock; where an object can't be read, its exception is set there.
int64_t fa_python_exchange_begin(const FaObjectCall* given);
/// Runs what remains, without the interpreter's lock, and deletes it, in any case.
FaError fa_python_exchange_run(fa::plugin::ObjectCall* call, int64_t num_threads);

}  // extern "C"
#pragma GCC visibility pop
