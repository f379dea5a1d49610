// SPDX-License-Identifier: Apache-2.0
// The one API of the operator: plan() checks a problem (StepParams) once and chooses its kernel for a device; launch() runs
// that Plan with an ExecutionContext's stream and memory. The answer is a Status. Called by the adapters in plugin/. Free of any
// framework: nothing here but the C++ standard library.
// Every function is thread-safe, throws nothing but std::bad_alloc, never exits or asserts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

namespace fa {

enum class DType : uint8_t { kFloat32, kFloat16, kBFloat16, kBool, kInt32, kInt64, kInt8, kUInt8, kFloat8E4M3 };
inline constexpr int kNumDTypes = 9;

/// As NumPy (with ml_dtypes) and PyTorch write it.
constexpr const char* name_of(DType dtype) {
  constexpr const char* kNames[kNumDTypes] = {"float32", "float16", "bfloat16", "bool",         "int32",
                                              "int64",   "int8",    "uint8",    "float8_e4m3fn"};
  return kNames[static_cast<int>(dtype)];
}

/// Bytes of an element.
constexpr int64_t size_of(DType dtype) {
  constexpr int64_t kBytes[kNumDTypes] = {4, 2, 2, 1, 4, 8, 1, 1, 1};
  return kBytes[static_cast<int>(dtype)];
}

/// One of the types of numbers that are not quantized.
constexpr bool is_float(DType dtype) { return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16; }

/// A shape for people: "[2, 4, 128, 64]".
std::string shape_text(const int64_t* shape, int rank);

/// More elements than any memory has.
inline constexpr int64_t kMostElements = int64_t{1} << 56;

/// Has a tensor of this shape more elements than that? Empty axes count as 1, so that no product of its sizes overflows.
/// Axes that it doesn't have are 0 or 1.
inline bool exceeds_memory(const int64_t (&shape)[4]) {
  int64_t count = 1;
  for (int64_t size : shape) {
    if (size > 0 && (__builtin_mul_overflow(count, size, &count) || count > kMostElements)) return true;
  }
  return false;
}

enum class StatusCode : uint8_t { kOk, kInvalidArgument, kUnsupported, kCudaError };

/// The outcome of a call: a code, and for anything but kOk one sentence for the user.
struct [[nodiscard]] Status {
  StatusCode code = StatusCode::kOk;
  std::string sentence;
  bool ok() const { return code == StatusCode::kOk; }
};

/// A strided tensor of rank <= 4 that somebody else owns. Unused trailing axes have shape 1.
/// `present` and not `data` tells an absent tensor: an empty one, or one of a plan made before memory exists, has no data.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  bool present = false;
  int64_t shape[4] = {1, 1, 1, 1};
  int64_t stride[4] = {0, 0, 0, 0};  // in elements; 0 on a broadcast axis; meaningless on an axis of size 1

  bool empty() const { return shape[0] == 0 || shape[1] == 0 || shape[2] == 0 || shape[3] == 0; }
};

/// What a row that attends no key yields. kZero: output 0 (ONNX, FlashAttention). kMean: the mean of all S_kv values,
/// which is what softmax gives where a mask is a large finite number added to every score (lse stays -inf). kValue: its head's
/// row of AttentionParams::empty_row_value.
enum class EmptyRow : uint8_t { kZero, kMean, kValue };

/// How GPUs multiply float32 tensors; of no meaning to other element types and to the CPU. kTf32x3: as three products of TF32
/// numbers, with float32's error (5e-7, relative). kTf32: as one, the operands rounded to 11 significant bits (4e-4).
enum class Float32Precision : uint8_t { kTf32x3, kTf32 };

/// One attention problem: out = softmax(softcap(scale * Q K^T) + bias, masked) V.
/// Position of query row i of batch b: p = i + query_offset(b). Key j is visible when all of these hold:
///   j < kv_length(b);  window_left < 0 or j >= p - window_left;  window_right < 0 or j <= p + window_right;
///   mask absent or (j < mask.shape[3] and mask true);  bias absent or j < bias.shape[3].
/// Causal attention is window_right = 0.
struct AttentionParams {
  TensorView query;  // [B, H_q, S_q, D] float32, float16, bfloat16 or float8; the last axis contiguous, as in all of the five
  TensorView key;    // [B, H_kv, S_kv, D], dtype of query (but see CacheParams::key_scale); H_q is a multiple of H_kv
  TensorView value;  // [B, H_kv, S_kv, D_v], likewise
  TensorView out;    // [B, H_q, S_q, D_v], dtype of query; of a float8 query any of the four
  TensorView lse;    // [B, H_q, S_q] float32, natural log-sum-exp of the masked scores and the sink; absent: not wanted

  TensorView mask;  // [B, H_q, S_q, <= S_kv] bool, one byte each, non-zero = attend; broadcast axes by stride 0; absent: all
  TensorView bias;  // [B, H_q, S_q, <= S_kv] float32, float16 or bfloat16, added after softcap; broadcast by stride 0

  TensorView kv_lengths;     // [B] int32 or int64: keys in use; absent: S_kv. Values outside [0, S_kv] are clamped
  TensorView query_lengths;  // [B] int32 or int64: rows in use, rows beyond are written 0 (lse -inf); absent: S_q
  TensorView cu_seqlens_q;   // [B + 1] int32: packed sequences. Then query, out, lse have shape[0] = 1 and S_q = total rows,
  TensorView cu_seqlens_kv;  // [B + 1] int32  and likewise key and value; sequence b is rows cu[b] … cu[b + 1] - 1
  TensorView query_offsets;  // [B] int32 or int64 (stride 0: one for all): query_offset(b); absent: the two fields below

  bool align_bottom_right = false;  // query_offset(b) = kv_length(b) - query_length(b) + query_offset
  int64_t query_offset = 0;         // else query_offset(b) = query_offset
  int64_t window_left = -1;         // neighbours before the own position, -1 = open
  int64_t window_right = -1;        // neighbours after it, -1 = open, 0 = causal

  TensorView alibi_slopes;  // [B, H_q] float32 (stride 0 over B where shared): adds -slope * |p - j|
  TensorView sinks;         // [H_q] float32: one more logit in each row's denominator, of no value

  // [H_q, D] dtype of query, which is not float8: added to each row of the query, the sum rounded to that dtype; absent: nothing.
  // With no norm and no rotary embedding.
  TensorView query_bias;
  TensorView empty_row_value;  // [H_q, D_v] dtype of query, which is not float8; with EmptyRow::kValue alone

  // A float8 tensor stands for its elements times a factor of each head: float32 [B, H_q] or [B, H_kv] (stride 0 where shared),
  // B being the packed sequences where there are some. Absent: 1. They go with a query of float8 alone.
  TensorView query_descale;
  TensorView key_descale;
  TensorView value_descale;
  TensorView output_scale;  // a float8 out is its elements divided by this, rounded, at most 448 in size

  float softmax_scale = 0;  // multiplies Q K^T; already resolved (never a "default" here)
  float softcap = 0;        // 0 = none; else s -> softcap * tanh(s / softcap), before bias and ALiBi
  EmptyRow empty_row = EmptyRow::kZero;
  Float32Precision float32_precision = Float32Precision::kTf32x3;
};

/// Rotary position embedding of the queries and of the new keys, before those are stored. Row i of a sequence is rotated by
/// position_ids, or else by its own position: query_offset(b) + i of a query, the place in the sequence of a key.
struct RotaryParams {
  TensorView cos;            // [positions, columns / 2], or by_row: [B, S_q, columns / 2]; float32, float16 or bfloat16
  TensorView sin;            // as cos; both or none
  TensorView position_ids;   // [B, S_q] int32 or int64; values outside of cos are clamped; absent: the own position
  bool by_row = false;       // cos and sin have one row for each row of the query, whatever its position
  bool interleaved = false;  // column 2 i is paired with 2 i + 1; else i with i + columns / 2
};

/// RMS normalisation of each head of the queries and of the new keys, before the rotary embedding. Absent: none.
struct NormParams {
  TensorView query_weight;  // [D] float32, float16 or bfloat16
  TensorView key_weight;    // [D] likewise
  float query_epsilon = 1e-6f;
  float key_epsilon = 1e-6f;
};

/// How new rows of keys and values join the cache, which is params.key and params.value.
/// kAppend: behind the past's. kWrite: each batch entry at its own position of a cache of fixed capacity. kWindow: likewise, but
/// the cache holds only the last rows (semantics/cache.h). kPaged: in blocks, which block_table lists for each sequence.
enum class CacheMode : uint8_t { kAppend, kWrite, kWindow, kPaged };

/// A cache step: what launch() does before it attends. Without new_key, key and value are complete as they are.
struct CacheParams {
  CacheMode mode = CacheMode::kAppend;
  TensorView new_key;        // [B, H_kv, S_new, D], dtype of query; in modes other than kAppend S_new is S_q, or 0: none
  TensorView new_value;      // [B, H_kv, S_new, D_v]; absent beside new_key: value is complete
  TensorView past_key;       // as key with P rows: where it is the memory of key, only new rows are written, else it is copied …
  TensorView past_value;     // … K and V alike
  TensorView present_key;    // kWindow with S_new > 1: key is memory for the step alone (P + S_new rows), and the rows that …
  TensorView present_value;  // … remain go here afterwards; absent: nowhere
  TensorView write_indices;  // [B] int32 or int64: position of the first new row; absent: kv_length(b) - rows in use, at least 0
  TensorView block_table;    // [B, blocks of a sequence] int32 or int64: key is [blocks, H_kv, rows of a block, D]
  TensorView slot_mapping;   // [S_new] int32 or int64: row of all blocks that a new row goes to, -1: nowhere; absent: by position
  TensorView key_scale;      // float32 [H_kv, D], stride 0 where shared: key is int8, float8 or uint8 (two int4), times this
  TensorView value_scale;    // float32 [H_kv, D_v]
};

/// A step of a model: an attention problem, and what is done to queries, keys and values before. Kernels that only attend take
/// the problem alone.
struct StepParams : AttentionParams {
  NormParams norm;
  RotaryParams rotary;
  CacheParams cache;
};

enum class DeviceType : uint8_t { kCpu, kCuda };

/// All that a plan may depend on besides the problem. The same for every call on a device, so an adapter asks for it once.
struct Device {
  DeviceType type = DeviceType::kCpu;
  int compute_capability = 0;   // 80, 86, 89, 90, …; 0 on the CPU
  int num_sms = 0;              // streaming multiprocessors; 0 on the CPU
  int shared_memory_bytes = 0;  // opt-in limit of one thread block
};

/// A row of the dispatch table (dispatch.h).
struct Kernel;

/// How one problem is computed on one device: made by plan(), carried out by launch().
struct Plan {
  const Kernel* kernel = nullptr;  // null: plan() has not succeeded
  Device device;
  bool reads_cache = false;        // on CUDA: the kernel is given the cache as it is: in pages, quantized
  int instance = 0;                // which of the kernel's own instances (element type, head size, tile shape)
  int num_splits = 1;              // parts of the keys that are worked off side by side and then merged
  size_t workspace_bytes = 0;      // memory that launch() needs beside the tensors; depends on no data
  bool writes_empty_rows = false;  // on CUDA, not EmptyRow::kZero: the kernel itself writes rows that attend no key; or …
  bool fills_empty_rows = false;   // … a second kernel does …
  size_t lse_bytes = 0;   // … and finds them by their log-sum-exp; where none is wanted, it lies behind the kernel's own …
  size_t step_bytes = 0;  // … and at the end of the workspace, on CUDA, what a cache step makes before the kernel attends
};

/// Runs task(arg, i) for every i in [0, num_tasks), on as many threads as the host gives; returns when all are done.
using ParallelFor = void (*)(void* pool, size_t num_tasks, void (*task)(void* arg, size_t i), void* arg);

/// With what a launch runs. On CUDA the device of the tensors is the current one.
struct ExecutionContext {
  void* stream = nullptr;              // cudaStream_t; work is enqueued on it and never waited for
  void* workspace = nullptr;           // device memory, 256-byte aligned, that no other stream uses meanwhile
  size_t workspace_bytes = 0;          // how much of it was reserved: a launch that needs more is refused
  ParallelFor parallel_for = nullptr;  // CPU only; null: the calling thread does it all
  void* pool = nullptr;
};

/// Checks shapes, dtypes and strides. Says which tensor is wrong, what it has and what is expected.
Status validate(const StepParams& params);

/// Checks the problem and chooses the first kernel of the dispatch table that supports it, or the one called `kernel` if that is
/// not null. Looks at shapes, dtypes, strides and the alignment of addresses, never at data; a null address counts as aligned.
Status plan(const StepParams& params, const Device& device, Plan* plan, const char* kernel = nullptr);

/// Stores the new rows of keys and values, where there are any, and computes params.out (and lse) as planned. `params` are those
/// of plan(); addresses may have been filled in or exchanged for others of the same alignment. On CUDA it only enqueues; an error
/// of the launch is returned, and not left behind in the CUDA runtime.
Status launch(const Plan& plan, const StepParams& params, const ExecutionContext& context);

/// Device memory that suffices for every problem of at most these sizes (batch, rows, keys), all else being equal. The largest
/// problem is not always the hungriest: few query rows are split over many keys, and each split keeps a partial result.
size_t max_workspace_bytes(const StepParams& largest, const Device& device);

/// A tensor by the name that a user knows.
struct NamedTensor {
  const char* name;
  const TensorView& tensor;
};

/// launch()'s rules of memory: what has elements has some, and what is written, in a launch or by the caller beside it, shares
/// none with any other tensor. But a present may be the very memory of its past.
Status check_memory(const StepParams& params, std::initializer_list<NamedTensor> also_written = {});

/// The kernels for a type of device, in order of preference: names for plan(). Null beyond the last.
const char* kernel_name(DeviceType type, int idx);

/// Which kernel would run and why: "prefill_sm80: …"; or for each kernel the sentence that says why not.
std::string explain(const StepParams& params, const Device& device);

/// Copies past [B, H, P, D] and then fresh [B, H, S, D] rows into present [B, H, P + S, D] (any strides, equal dtypes).
/// What a cache step does before attention; on CUDA enqueued on the context's stream.
Status append_kv(const TensorView& past, const TensorView& fresh, const TensorView& present, const Device& device,
                 const ExecutionContext& context);

/// What the CUDA device number `ordinal` is; the driver is asked once for each device of the process. kUnsupported with a
/// sentence where there is no driver or no such GPU.
Status query_cuda_device(int ordinal, Device* device);

/// The number of the current CUDA device of this thread; otherwise as query_cuda_device.
Status current_cuda_device(int* ordinal);

}  // namespace fa
