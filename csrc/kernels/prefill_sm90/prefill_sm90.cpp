// SPDX-License-Identifier: Apache-2.0
// Which problems the Hopper kernel takes, and the choice of its instance.
#include "kernels/prefill_sm90/prefill_sm90.h"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <utility>

#include "dispatch.h"
#include "kernels/common/smallest_instance.h"
#include "kernels/common/spoilt_rows.h"
#include "kernels/common/tensor_map.h"
#include "kernels/prefill_sm90/args.h"
#include "kernels/prefill_sm90/instances.h"
#include "kernels/prefill_sm90/shape.h"
#include "kernels/prefill_sm90/tile_counter.h"
#include "semantics/sequence.h"

namespace fa::prefill_sm90 {
namespace {

constexpr int64_t kMaxRows = int64_t{1} << 29;  // positions and sums of two fit 32 bits
constexpr int64_t kManyKeys = 2048;             // from here on long tiles of modified scores are faster than tall ones
constexpr int64_t kKeysOfBroad = 1024;          // of a row in the mean: from here on broad tiles are faster than middle ones

struct Instance {
  DType dtype;
  int head_dim;  // bucket: the largest head_dim and head_dim_v it takes
  Variant variant;
  Status (*launch)(const Plan& plan, const AttentionParams& params, const ExecutionContext& context);
};

const Instance kInstances[] = {
#define FA_INSTANCE(T, dtype, head_dim, variant) \
  {dtype, head_dim, Variant::variant, launch_instance<T, head_dim, Variant::variant>},
#include "kernels/prefill_sm90/instances.def"
#undef FA_INSTANCE
};

int64_t bucket_size(const AttentionParams& p) { return std::max(p.query.shape[3], p.value.shape[3]); }

/// A variant that could run the problem, and its time for a row that all variants have, in percent.
struct Candidate {
  Variant variant;
  int64_t cost = 100;
};

/// The variant whose tiles fill the GPU most evenly, so that the busiest multiprocessor ends first. Of equal ones the first.
Variant fastest(std::initializer_list<Candidate> candidates, const AttentionParams& p, const Device& device) {
  const int head_dim = static_cast<int>(bucket_size(p));
  const auto time = [&](const Candidate& c) { return busiest_rows(p, device, tile_shape(head_dim, c.variant).rows()) * c.cost; };
  return std::min_element(candidates.begin(), candidates.end(), [&](auto& a, auto& b) { return time(a) < time(b); })->variant;
}

/// Of those that add to scores or mask rows.
Variant choose_modified(const AttentionParams& p, const Device& device) {
  const int64_t head_dim = bucket_size(p), keys = keys_in_window(p);
  const bool has_tiles = !p.bias.present || bias_has_tiles(p);  // else threads read the bias
  if (!has_tiles && p.bias.dtype == p.query.dtype && head_dim <= 128) return Variant::kModifiedShort;
  if (head_dim > 64) return Variant::kModified;
  const Candidate shortest{Variant::kModifiedShort, keys <= kFewKeys ? 110 : 125};
  const Candidate longest{Variant::kModified, keys <= kFewKeys ? 130 : 100};
  const bool tall_can = has_tiles && !p.mask.present && p.key.shape[2] < kManyKeys;
  return tall_can ? fastest({{Variant::kModifiedTall}, shortest, longest}, p, device) : fastest({longest, shortest}, p, device);
}

/// The fastest variant, by measurement (docs/experiments/prefill.md). Several blocks of short tiles on a multiprocessor do less
/// at a time, but hide each other's start and end, which makes up for it with few keys; those of heads of 256 bring keys in
/// smaller portions.
Variant choose_variant(const AttentionParams& p, const Device& device) {
  if (is_modified(p)) return choose_modified(p, device);
  const int64_t head_dim = bucket_size(p);
  if (head_dim <= 64) {
    const int64_t short_cost = keys_in_window(p) <= kFewKeys ? 100 : 125;
    return fastest({{Variant::kShort, short_cost}, {Variant::kTall}, {Variant::kPlain}}, p, device);
  }
  if (head_dim <= 96) {
    const Candidate plain{Variant::kPlain}, middle{Variant::kMiddle, 125};
    return p.query_bias.present ? fastest({plain, middle}, p, device)
                                : fastest({plain, middle, {Variant::kShort, 150}}, p, device);
  }
  if (head_dim <= 128) {
    const int64_t keys = mean_keys(p), middle_cost = keys <= kFewKeys ? 110 : 120;
    const Candidate middle = keys < kKeysOfBroad ? Candidate{Variant::kMiddle, middle_cost}
                                                 : Candidate{Variant::kBroad, p.window_right >= 0 ? 110 : 106};
    return fastest({middle, {Variant::kShort, 125}, {Variant::kPlain}}, p, device);
  }
  const bool few_keys = p.window_right >= 0 && mean_keys(p) <= kFewKeys;
  return head_dim > 192 && few_keys ? Variant::kShort : Variant::kPlain;
}

/// Of the fastest variant.
const Instance* find_instance(const AttentionParams& p, const Device& device) {
  const Variant variant = choose_variant(p, device);
  return smallest_instance(
      kInstances, p, [&](const Instance& instance) { return instance.dtype == p.query.dtype && instance.variant == variant; });
}

}  // namespace

bool suits_hopper(const AttentionParams& p, const Device& device, std::string* why_not) {
  FA_REFUSE_IF(device.compute_capability != 90, "needs compute capability 9.0 (Hopper)");
  FA_REFUSE_IF(device.shared_memory_bytes < kSharedLimit,
               "needs " + std::to_string(kSharedLimit) + " bytes of shared memory in a thread block");
  const int64_t unit = 16 / size_of(p.query.dtype);
  FA_REFUSE_IF(p.query.shape[3] % unit != 0 || p.value.shape[3] % unit != 0,
               "head_dim " + std::to_string(p.query.shape[3]) + " and head_dim_v " + std::to_string(p.value.shape[3]) +
                   " must be multiples of " + std::to_string(unit) + ": the copy engine (TMA) moves 16 bytes");
  FA_REFUSE_IF(p.key.shape[2] == 0, "there are no keys");
  FA_REFUSE_IF(p.query.shape[2] > kMaxRows || p.key.shape[2] > kMaxRows, "more than 2^29 rows or keys");
  const std::pair<const char*, const TensorView*> tensors[] = {
      {"query", &p.query}, {"key", &p.key}, {"value", &p.value}, {"out", &p.out}};
  for (const auto& [name, tensor] : tensors) {
    FA_REFUSE_IF(!has_tensor_map(*tensor),
                 std::string("the copy engine (TMA) can't address ") + name + ", which " + tensor_map_obstacle(*tensor));
  }
  FA_REFUSE_IF(num_tiles(p, kRowsUnit) > std::numeric_limits<int32_t>::max(), "more than 2^31 tiles of rows");
  return true;
}

size_t workspace_bytes(const AttentionParams& p) {
  const int64_t tiles = may_spoil_rows(p) ? num_tiles(p, kRowsUnit) : 0;  // no instance has more
  return kCounterBytes + static_cast<size_t>(tiles) * sizeof(SpoiltTile);
}

constexpr int64_t kKeysOfQuickMean = 128;  // a warp adds up so many in the time of a launch or two

/// Does the kernel itself write what rows that attend no key yield, if that is not 0? Where a mask for each batch entry decides
/// which keys its rows see, alone or with a window over few keys; elsewhere such rows may be many, and a second kernel computes
/// the mean of a head once for all of them.
bool writes_empty_rows(const AttentionParams& p) {
  const bool rows_alike = p.mask.present && (p.mask.shape[2] == 1 || p.mask.stride[2] == 0);
  const bool has_window = p.window_left >= 0 || p.window_right >= 0;
  const bool nothing_else = !p.bias.present && !p.kv_lengths.present && !p.query_lengths.present && !p.cu_seqlens_q.present &&
                            !p.sinks.present && (!has_window || p.key.shape[2] <= kKeysOfQuickMean);
  return p.empty_row != EmptyRow::kZero && rows_alike && nothing_else;
}

bool plan(const AttentionParams& p, Plan* plan, std::string* why_not) {
  FA_REFUSE_IF(size_of(p.query.dtype) != 2,
               std::string("takes float16 and bfloat16 only, the tensors are ") + name_of(p.query.dtype));
  if (!suits_hopper(p, plan->device, why_not)) return false;
  const Instance* instance = find_instance(p, plan->device);
  FA_REFUSE_IF(instance == nullptr, "head_dim " + std::to_string(bucket_size(p)) + " is above 256");
  plan->instance = static_cast<int>(instance - kInstances);
  plan->workspace_bytes = workspace_bytes(p);
  plan->writes_empty_rows = writes_empty_rows(p);
  return true;
}

Status launch(const Plan& plan, const AttentionParams& params, const ExecutionContext& context) {
  return kInstances[plan.instance].launch(plan, params, context);
}

}  // namespace fa::prefill_sm90
