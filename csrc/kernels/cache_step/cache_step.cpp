// SPDX-License-Identifier: Apache-2.0
// The host's side of a cache step: what memory it needs, what is left to attend, and which blocks do what.
#include "kernels/cache_step/cache_step.h"

#include <algorithm>
#include <limits>

#include "kernels/cache_step/make_args.h"
#include "kernels/cache_step/plain_step.h"
#include "kernels/cache_step/transform_rows.h"
#include "kernels/common/launch.h"

namespace fa::cache_step {
namespace {

/// Hands out a workspace piece by piece; without one only counts.
class Memory {
 public:
  explicit Memory(void* workspace) : base_(static_cast<char*>(workspace)) {}

  /// A row-major tensor of this shape; the axes of `shared` have one entry for all.
  TensorView tensor(DType dtype, const int64_t (&shape)[4], const bool (&shared)[4] = {}) {
    TensorView view;
    view.dtype = dtype;
    view.present = true;
    int64_t count = 1;
    for (int axis = 3; axis >= 0; --axis) {
      view.shape[axis] = shape[axis];
      view.stride[axis] = shared[axis] ? 0 : count;
      count *= shared[axis] ? 1 : shape[axis];
    }
    view.data = base_ == nullptr ? nullptr : base_ + bytes_;
    bytes_ += (static_cast<size_t>(count * size_of(dtype)) + 255) / 256 * 256;
    return view;
  }
  size_t bytes() const { return bytes_; }

 private:
  char* base_;
  size_t bytes_ = 0;
};

bool is_shared(const TensorView& t, int axis) { return t.shape[axis] > 1 && t.stride[axis] == 0; }

/// Room for a mask or bias whose columns are rows of the cache.
TensorView shifted(const TensorView& t, int64_t rows, Memory* memory) {
  return memory->tensor(t.dtype, {t.shape[0], t.shape[1], t.shape[2], rows}, {false, is_shared(t, 1), is_shared(t, 2), false});
}

/// Keys (0) or values (1) as rows of the queries' type in one piece.
TensorView gathered(const StepParams& p, int which, Memory* memory) {
  const TensorView& cache = which == 0 ? p.key : p.value;
  const int64_t columns = which == 0 ? p.query.shape[3] : p.out.shape[3];
  const bool paged = p.cache.mode == CacheMode::kPaged;
  const int64_t rows = paged ? num_sequences(p) * cache_rule(p).rows : cache.shape[2];
  return memory->tensor(p.query.dtype, {paged ? 1 : cache.shape[0], cache.shape[1], rows, columns});
}

}  // namespace

Step prepare(const StepParams& p, void* workspace, bool reads_cache) {
  const CacheParams& c = p.cache;
  Step step;
  static_cast<AttentionParams&>(step.problem) = p;
  AttentionParams& left = step.problem;
  Memory memory(workspace);
  const bool paged = c.mode == CacheMode::kPaged;
  if (p.norm.query_weight.present || p.rotary.cos.present) {
    // In the order [B, S_q, H_q, D]: the rows of a position lie side by side.
    const int64_t (&q)[4] = p.query.shape;
    step.query = memory.tensor(p.query.dtype, {q[0], q[2], q[1], q[3]});
    std::swap(step.query.shape[1], step.query.shape[2]);
    std::swap(step.query.stride[1], step.query.stride[2]);
    left.query = step.query;
  }
  if (reads_cache && (paged || c.mode == CacheMode::kWrite)) {
    step.problem.cache = c;
    step.bytes = memory.bytes();
    return step;
  }
  if (reads_cache) {
    step.problem.cache.key_scale = c.key_scale;
    step.problem.cache.value_scale = c.value_scale;
  } else {
    if (paged || c.key_scale.present) left.key = step.gathered[0] = gathered(p, 0, &memory);
    if (paged || c.value_scale.present) left.value = step.gathered[1] = gathered(p, 1, &memory);
  }
  if (c.mode == CacheMode::kWindow && p.mask.present) left.mask = step.mask = shifted(p.mask, p.key.shape[2], &memory);
  if (c.mode == CacheMode::kWindow && p.bias.present) left.bias = step.bias = shifted(p.bias, p.key.shape[2], &memory);
  if (c.mode != CacheMode::kAppend) {
    const int64_t sequences = num_sequences(p);
    left.query_offsets = step.query_offsets = memory.tensor(DType::kInt64, {sequences, 1, 1, 1});
    left.align_bottom_right = false;
    left.query_offset = 0;
    left.kv_lengths = {};
    if (paged) {
      left.cu_seqlens_kv = step.cu_seqlens_kv = memory.tensor(DType::kInt32, {sequences + 1, 1, 1, 1});
    } else {
      left.kv_lengths = step.kv_lengths = memory.tensor(DType::kInt64, {sequences, 1, 1, 1});
    }
  }
  step.bytes = memory.bytes();
  return step;
}

Status launch(const StepParams& params, const Step& step, const Device& device, const ExecutionContext& context) {
  const auto stream = static_cast<cudaStream_t>(context.stream);
#ifdef FA_WITH_SM90
  const bool early = device.compute_capability == 90;
#else
  const bool early = false;
  (void)device;
#endif
  constexpr const char* kFailed = "The cache step could not be launched";
  PlainArgs plain;
  if (make_plain_args(params, step, &plain)) return cuda_status(launch_plain(plain, early, stream), kFailed);
  Args args;
  if (!make_args(params, step, &args))
    return {StatusCode::kUnsupported,
            "The cache step has more than 2^31 - 1 rows of queries, keys and values; take several steps."};
  RowsArgs rows;
  cudaError_t error = cudaSuccess;
  if (make_rows_args(params, step, &rows)) {
    args.query_blocks = args.new_blocks = 0;
    error = launch_rows(rows, early, stream);
  }
  if (error == cudaSuccess && args.store_blocks() > 0) error = launch_store(args, early, stream);
  if (error == cudaSuccess && args.finish_blocks() > 0) error = launch_finish(args, early, stream);
  return cuda_status(error, kFailed);
}

}  // namespace fa::cache_step
