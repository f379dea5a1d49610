// SPDX-License-Identifier: Apache-2.0
// The kernel of plain_step.h: a warp for each row of queries, new keys and new values, all of whose loads are under way at once.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/cache_step/plain_step.h"
#include "kernels/common/convert.cuh"
#include "kernels/common/launch.h"
#include "kernels/common/launch_early.h"
#include "kernels/common/scales.h"
#include "semantics/quantize.h"
#include "semantics/transform.h"

namespace fa::cache_step {
namespace {

constexpr int kPlainThreads = 128, kPlainWarps = kPlainThreads / 32;
constexpr int kHeld = 2;  // groups of four columns that a lane holds

struct Half {
  static __device__ float2 floats(uint32_t x) { return __half22float2(*reinterpret_cast<__half2*>(&x)); }
  static __device__ uint32_t bits(float x, float y) {
    const __half2 both = __floats2half2_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
};

struct BFloat {
  static __device__ float2 floats(uint32_t x) { return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&x)); }
  static __device__ uint32_t bits(float x, float y) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
};

/// Two elements at an even column.
__device__ __forceinline__ uint32_t load_2(const void* row, unsigned column) {
  return *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(row) + column);
}

/// Four columns of a row in two twos: of a row that is rotated by halves two columns and those that they are paired with.
struct Group {
  unsigned first, second;  // columns
  uint32_t low, high;      // elements
};

/// The numbers of a group.
struct Numbers {
  float2 low, high;
};

template <class T>
__device__ __forceinline__ Numbers numbers_of(const Group& group) {
  return {T::floats(group.low), T::floats(group.high)};
}

/// Rotates its two pairs: (low, high) where they are paired by halves, else the two of low and the two of high.
template <class T>
__device__ __forceinline__ Numbers rotated(const Group& group, uint32_t cos_bits, uint32_t sin_bits, bool interleaved) {
  const float2 cos = T::floats(cos_bits), sin = T::floats(sin_bits);
  const auto [low, high] = numbers_of<T>(group);
  if (interleaved)
    return {{rotated_first(low.x, low.y, cos.x, sin.x), rotated_second(low.x, low.y, cos.x, sin.x)},
            {rotated_first(high.x, high.y, cos.y, sin.y), rotated_second(high.x, high.y, cos.y, sin.y)}};
  return {{rotated_first(low.x, high.x, cos.x, sin.x), rotated_first(low.y, high.y, cos.y, sin.y)},
          {rotated_second(low.x, high.x, cos.x, sin.x), rotated_second(low.y, high.y, cos.y, sin.y)}};
}

/// Two columns of a quantized cache: to_float8 and to_int8 of semantics/quantize.h in the GPU's own instructions, since each that
/// is fetched counts.
__device__ __forceinline__ void store_2(uint8_t* target, float2 numbers, float2 scales, bool float8) {
  const float first = numbers.x / scales.x, second = numbers.y / scales.y;
  if (float8) {
#if __CUDA_ARCH__ >= 890
    store_pair(reinterpret_cast<Float8*>(target), first, second);
#else  // earlier GPUs have no such instruction
    target[0] = to_float8(numbers.x, scales.x);
    target[1] = to_float8(numbers.y, scales.y);
#endif
    return;
  }
  const int low = min(max(__float2int_rn(first), -128), 127), high = min(max(__float2int_rn(second), -128), 127);
  *reinterpret_cast<uint16_t*>(target) = static_cast<uint16_t>((low & 0xff) | high << 8);
}

/// The rule of all modes, for this one only. New rows of packed sequences lie as their queries do, so nothing else is packed.
template <bool kPaged>
__device__ __forceinline__ CacheStep step_of(CacheRule rule, int64_t sequence) {
  rule.mode = kPaged ? CacheMode::kPaged : CacheMode::kWrite;
  rule.sequences.cu_seqlens_kv.data = nullptr;
  if (!kPaged) rule.sequences.cu_seqlens_q.data = nullptr;
  return rule.at(sequence);
}

/// SequenceRule::sequence_of by a whole warp, whose lanes look at 32 sequences at a time.
__device__ __forceinline__ int sequence_of(const SequenceRule& sequences, unsigned row, unsigned lane) {
  const int num_sequences = static_cast<int>(sequences.num_sequences);
  int first = 0, count = num_sequences;  // the last sequence that begins at or before the row is first … first + count - 1
  while (count > 1) {
    const int apart = (count + 31) / 32, own = first + static_cast<int>(lane) * apart;
    const bool begun = own < first + count && sequences.cu_seqlens_q.at(own) <= row;
    const int last = max(31 - __clz(__ballot_sync(0xffffffffu, begun)), 0);
    count = min(apart, count - last * apart);
    first += last * apart;
  }
  return first;
}

/// Where new row `row` of the tensors goes, as elements from the beginning of its head's first page or cache; negative: nowhere.
template <bool kPaged>
__device__ __forceinline__ int64_t target_of(const PlainArgs& args, const RowMove& move, const CacheStep& step, int64_t sequence,
                                             unsigned row) {
  const int64_t i = row - step.sequence.first_row, slot = step.first_new + i;
  if (i >= step.num_new) return -1;
  if (!kPaged) return slot < args.rule.rows ? sequence * move.to_batch + slot * move.to_row : -1;
  const PlainPages& pages = args.pages;
  const bool is_given = pages.slots.data != nullptr;
  const int64_t place = is_given ? pages.slots.at(row) : slot,
                most = is_given ? pages.count * pages.rows.divisor : args.rule.rows;
  if (place < 0 || place >= most) return -1;
  const int64_t idx = pages.rows.quotient(static_cast<uint32_t>(place)), row_in_page = place - idx * pages.rows.divisor;
  const IndexView table = {
      static_cast<const char*>(pages.table.data) + sequence * pages.sequence_stride * (pages.table.wide ? 8 : 4),
      pages.table.stride, pages.table.wide};
  const int64_t page = is_given ? idx : table.at(idx);
  return page >= 0 && page < pages.count ? page * move.to_batch + row_in_page * move.to_row : -1;
}

/// Lengths and positions for the attention kernel, of 32 sequences.
template <bool kPaged>
__device__ __forceinline__ void store_lengths(const PlainArgs& args, int64_t sequence) {
  if (args.kv_lengths == nullptr || sequence >= args.rule.sequences.num_sequences) return;
  const MaskRule mask = step_of<kPaged>(args.rule, sequence).sequence.mask;
  args.kv_lengths[sequence] = mask.kv_length;
  args.query_offsets[sequence] = mask.query_offset;
}

template <class T, bool kPaged, bool kQuantized>
__global__ void __launch_bounds__(kPlainThreads) plain_kernel(const __grid_constant__ PlainArgs args) {
  // 1. The attention kernel may come: the sooner, the better. What is below waits for arguments and memory.
#if __CUDA_ARCH__ >= 900
  wait_for_earlier_kernels();
  let_next_kernel_start();
#endif
  // 2. Which row is this warp's.
  const unsigned idx = blockIdx.x * kPlainWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned any_row = args.heads.quotient(idx), any_head = idx - any_row * args.heads.divisor;
  const unsigned batch_idx = args.rows.quotient(any_row), row = any_row - batch_idx * args.rows.divisor;
  const int which = any_head < args.first_head[1] ? 0 : any_head < args.first_head[2] ? 1 : 2;
  const PlainRows& move = args.moves[which];
  const int64_t head = any_head - args.first_head[which];
  if (idx >= args.count) return store_lengths<kPaged>(args, int64_t{idx - args.count} * 32 + lane);
  // 3. The row, and at the same time the lengths that tell where it goes.
  const char* source =
      static_cast<const char*>(move.from) + 2 * (batch_idx * move.from_batch + head * move.from_head + row * move.from_row);
  Group groups[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const unsigned g = lane + 32 * i;
    const bool by_halves = g < move.rotated_groups && !args.interleaved;
    groups[i].first = by_halves ? 2 * g : 4 * g;
    groups[i].second = by_halves ? 2 * (move.rotated_groups + g) : 4 * g + 2;
    if (g >= move.groups) continue;
    groups[i].low = load_2(source, groups[i].first);
    groups[i].high = load_2(source, groups[i].second);
  }
  Numbers scales[kHeld];
  if (kQuantized && which > 0) {
    const Scales its = scales_of(args.scales[which - 1], head);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (lane + 32 * i >= move.groups) continue;
      const unsigned first = groups[i].first, second = groups[i].second;
      scales[i] = {{its.at(first), its.at(first + 1)}, {its.at(second), its.at(second + 1)}};
    }
  }
  const int64_t sequence = kPaged ? sequence_of(args.rule.sequences, row, lane) : batch_idx;
  const CacheStep step = step_of<kPaged>(args.rule, sequence);
  const int64_t i = row - step.sequence.first_row;  // among the rows of its sequence
  if (i < 0 || i >= step.sequence.query_length) {
    if (which > 0) return;
#pragma unroll
    for (Group& group : groups) group.low = group.high = 0;  // as store_queries() does
  }
  const int64_t place =
      which == 0 ? batch_idx * move.to_batch + row * move.to_row : target_of<kPaged>(args, move, step, sequence, row);
  if (place < 0) return;
  // 4. Rotated by its position, there.
  Numbers numbers[kHeld];
  if constexpr (kQuantized) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) numbers[i] = numbers_of<T>(groups[i]);
  }
  if (move.rotated_groups > 0) {
    const int64_t position = which == 0 ? position_of_query(step, i) : position_of_new_row(args.rule, step, i);
    const int64_t angle = SequenceRule::clamp(position, 0, args.last_angle);
    const uint16_t* cos = static_cast<const uint16_t*>(args.cos) + angle * args.cos_row;
    const uint16_t* sin = static_cast<const uint16_t*>(args.sin) + angle * args.sin_row;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const unsigned g = lane + 32 * i;
      if (g >= move.rotated_groups) continue;
      numbers[i] = rotated<T>(groups[i], load_2(cos, 2 * g), load_2(sin, 2 * g), args.interleaved);
      groups[i].low = T::bits(numbers[i].low.x, numbers[i].low.y);
      groups[i].high = T::bits(numbers[i].high.x, numbers[i].high.y);
    }
  }
  if (kQuantized && which > 0) {
    auto* target = static_cast<uint8_t*>(move.to) + (head * move.to_head + place);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (lane + 32 * i >= move.groups) continue;
      store_2(target + groups[i].first, numbers[i].low, scales[i].low, args.float8);
      store_2(target + groups[i].second, numbers[i].high, scales[i].high, args.float8);
    }
    return;
  }
  auto* target = static_cast<uint16_t*>(move.to) + (head * move.to_head + place);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (lane + 32 * i >= move.groups) continue;
    *reinterpret_cast<uint32_t*>(target + groups[i].first) = groups[i].low;
    *reinterpret_cast<uint32_t*>(target + groups[i].second) = groups[i].high;
  }
}

}  // namespace

template <class T>
static auto plain_kernel_for(const PlainArgs& args) {
  if (args.scales[0].present) return args.is_paged ? plain_kernel<T, true, true> : plain_kernel<T, false, true>;
  return args.is_paged ? plain_kernel<T, true, false> : plain_kernel<T, false, false>;
}

cudaError_t launch_plain(const PlainArgs& args, bool early, cudaStream_t stream) {
  const auto kernel = args.bfloat16 ? plain_kernel_for<BFloat>(args) : plain_kernel_for<Half>(args);
  const auto lengths = args.kv_lengths != nullptr ? static_cast<unsigned>((args.rule.sequences.num_sequences + 31) / 32) : 0;
  const unsigned blocks = (args.count + lengths + kPlainWarps - 1) / kPlainWarps;
  if (early) return launch_early(kernel, static_cast<int>(blocks), kPlainThreads, 0, stream, args);
  return launch_kernel(kernel, dim3(blocks), kPlainThreads, 0, stream, args);
}

}  // namespace fa::cache_step
