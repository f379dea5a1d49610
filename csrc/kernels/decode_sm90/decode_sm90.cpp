// SPDX-License-Identifier: Apache-2.0
// Which problems the decoding kernel for Hopper takes, the choice of its instance, and how much workspace it needs.
#include "kernels/decode_sm90/decode_sm90.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "dispatch.h"
#include "kernels/common/scales.h"
#include "kernels/common/smallest_instance.h"
#include "kernels/common/tensor_map.h"
#include "kernels/decode_sm90/instances.h"
#include "kernels/decode_sm90/merge_counters.h"
#include "kernels/decode_sm90/shape.h"

namespace fa::decode_sm90 {
namespace {

constexpr int64_t kMaxRows = int64_t{1} << 29;   // positions and sums of two fit 32 bits
constexpr int64_t kMaxUnits = int64_t{1} << 30;  // likewise
constexpr int64_t kFewRows = 8;                  // of a sequence: read by as many tiles of rows as its query heads need
constexpr int64_t kMaxTileRows = 16;             // of one head, where keys need no splitting; more is work for prefill
constexpr int64_t kMinKeysToSplit = 256;
constexpr int64_t kPageRows = 16;  // of half a key tile; a copy of fewer takes the copy engine longer than the memory

struct Instance {
  DType dtype;
  Variant stored;  // of keys and values
  int head_dim;    // bucket: the largest head_dim and head_dim_v it takes
  Status (*launch)(const Plan& plan, const StepParams& params, const ExecutionContext& context);
};

const Instance kInstances[] = {
#define FA_INSTANCE(T, dtype, head_dim, variant) \
  {dtype, Variant::variant, head_dim, launch_instance<T, head_dim, Variant::variant>},
#include "kernels/decode_sm90/instances.def"
#undef FA_INSTANCE
};

bool is_quantized(const StepParams& p) { return p.cache.key_scale.present || p.cache.value_scale.present; }

const Instance* find_instance(const StepParams& p) {
  const Variant stored = !is_quantized(p) ? Variant::kAsQuery : p.key.dtype == DType::kInt8 ? Variant::kInt8 : Variant::kFloat8;
  return smallest_instance(
      kInstances, p, [&](const Instance& instance) { return instance.dtype == p.query.dtype && instance.stored == stored; });
}

/// Two neighbouring elements of the queries are read at once.
bool has_pairs(const TensorView& query) {
  bool aligned = reinterpret_cast<uintptr_t>(query.data) % 4 == 0;
  for (int axis = 0; axis < 3; ++axis) aligned = aligned && (query.shape[axis] == 1 || query.stride[axis] % 2 == 0);
  return aligned;
}

/// Is it decoding at all?
bool has_few_rows(const StepParams& p, const Device& device, std::string* why_not) {
  const int64_t rows = mean_rows(p), pairs = rows * group_size(p);
  FA_REFUSE_IF(rows > kFewRows && (p.cu_seqlens_q.present || pairs > kMostTileRows),
               "a sequence has " + std::to_string(rows) + " rows, and " + std::to_string(pairs) +
                   " with the query heads of a key head; for decoding at most " + std::to_string(kFewRows) + ", or " +
                   std::to_string(kMostTileRows) + " with the heads");
  const bool splits_keys = num_sequences(p) * p.key.shape[1] < device.num_sms && num_keys(p) >= kMinKeysToSplit;
  FA_REFUSE_IF(rows > kMaxTileRows && !splits_keys, "the keys need no splitting, and seqlen_q " + std::to_string(rows) +
                                                        " is more than " + std::to_string(kMaxTileRows));
  return true;
}

/// Pages hold whole boxes of the copy engine.
bool can_read_cache(const StepParams& p, std::string* why_not) {
  FA_REFUSE_IF(p.empty_row != EmptyRow::kZero, "rows that attend no key are filled by a kernel that takes no cache");
  FA_REFUSE_IF(is_quantized(p) && (p.key.dtype != p.value.dtype || p.key.dtype == DType::kUInt8),
               std::string("reads quantized caches of int8 or float8, keys and values alike; the tensors are ") +
                   name_of(p.key.dtype) + " and " + name_of(p.value.dtype));
  FA_REFUSE_IF(is_quantized(p) && !(are_by_four(p.cache.key_scale) && are_by_four(p.cache.value_scale)),
               "the scales of four columns are not at multiples of 16 bytes");
  if (!in_pages(p)) return true;
  FA_REFUSE_IF(p.key.shape[2] % kPageRows != 0,
               "pages have " + std::to_string(p.key.shape[2]) + " rows, expected a multiple of " + std::to_string(kPageRows));
  FA_REFUSE_IF(p.key.shape[0] > kMaxRows || p.key.shape[2] > kMaxRows, "more than 2^29 pages or rows of a page");
  return true;
}

}  // namespace

bool plan(const StepParams& p, Plan* plan, std::string* why_not) {
  const Device& device = plan->device;
  FA_REFUSE_IF(device.compute_capability != 90, "needs compute capability 9.0 (Hopper)");
  FA_REFUSE_IF(device.shared_memory_bytes < kSharedLimit,
               "needs " + std::to_string(kSharedLimit) + " bytes of shared memory in a thread block");
  FA_REFUSE_IF(size_of(p.query.dtype) != 2,
               std::string("takes float16 and bfloat16 only, the tensors are ") + name_of(p.query.dtype));
  FA_REFUSE_IF(p.query_bias.present, "adds no query_bias");
  if (!has_few_rows(p, device, why_not)) return false;
  FA_REFUSE_IF(p.query.shape[3] % 8 != 0 || p.value.shape[3] % 8 != 0,
               "head_dim " + std::to_string(p.query.shape[3]) + " and head_dim_v " + std::to_string(p.value.shape[3]) +
                   " must be multiples of 8: the copy engine (TMA) moves 16 bytes");
  FA_REFUSE_IF(num_keys(p) == 0, "there are no keys");
  FA_REFUSE_IF(p.query.shape[2] > kMaxRows / group_size(p) || num_keys(p) > kMaxRows, "more than 2^29 rows or keys");
  if ((p.cache.mode != CacheMode::kAppend || is_quantized(p)) && !can_read_cache(p, why_not)) return false;
  const std::pair<const char*, const TensorView*> tensors[] = {{"key", &p.key}, {"value", &p.value}};
  for (const auto& [name, tensor] : tensors) {
    FA_REFUSE_IF(!has_tensor_map(*tensor),
                 std::string("the copy engine (TMA) can't address ") + name + ", which " + tensor_map_obstacle(*tensor));
  }
  FA_REFUSE_IF(!has_pairs(p.query), "the rows of query are not at multiples of 4 bytes");
  const Instance* instance = find_instance(p);
  FA_REFUSE_IF(instance == nullptr, "head_dim " + std::to_string(bucket_size(p)) + " is above 256");
  const TileShape tile = tile_shape(instance->head_dim);
  const int blocks = num_blocks(p, device, tile);
  FA_REFUSE_IF(most_units(p, tile) > kMaxUnits, "more than 2^30 tiles of keys");
  FA_REFUSE_IF(blocks > kMaxBlocks, "is made for up to " + std::to_string(kMaxBlocks) + " multiprocessors");
  plan->instance = static_cast<int>(instance - kInstances);
  plan->workspace_bytes = kCounterBytes + 2 * blocks * slot_words(most_rows(p), p.value.shape[3]) * sizeof(float);
  return true;
}

/// Fewer rows and keys need less: blocks and rows of a tile are at most those of the largest problem, and at most 64 rows share a
/// tile.
size_t max_workspace_bytes(const StepParams& largest, const Device& device) {
  const Instance* instance = find_instance(largest);
  if (device.compute_capability != 90 || instance == nullptr) return 0;
  const int rows = static_cast<int>(std::min<int64_t>(kMostTileRows, largest.query.shape[2] * group_size(largest)));
  const int64_t blocks = std::min<int64_t>(int64_t{device.num_sms} * tile_shape(instance->head_dim).blocks_per_sm, kMaxBlocks);
  return kCounterBytes + 2 * blocks * slot_words(rows, largest.value.shape[3]) * sizeof(float);
}

Status launch(const Plan& plan, const StepParams& params, const ExecutionContext& context) {
  return kInstances[plan.instance].launch(plan, params, context);
}

}  // namespace fa::decode_sm90
