// SPDX-License-Identifier: Apache-2.0
// Which problems the Hopper kernel takes, and the choice of its instance.
#include "kernels/prefill_sm90/prefill_sm90.h"

#include <algorithm>
#include <limits>

#include "kernels/common/tensor_map.h"
#include "kernels/prefill_sm90/instances.h"
#include "semantics/sequence.h"

namespace fa::prefill_sm90 {
namespace {

constexpr int64_t kMaxRows = int64_t{1} << 29;  // positions and sums of two fit 32 bits
constexpr int64_t kLongTile = 192;              // rows of a tile of the long instances
constexpr int64_t kFewKeys = 320;        // up to so many keys a row the short tiles of narrow heads were measured to be faster,
constexpr int64_t kFewKeysUnlike = 640;  // and up to so many, on average, where rows have unlike numbers of them
constexpr size_t kCounterBytes = 256;    // the tile counter, in an allocation's smallest unit

struct Instance {
  DType dtype;
  int head_dim;  // bucket: the largest head_dim and head_dim_v it takes
  Variant variant;
  Status (*launch)(const AttentionParams& params, const ExecutionContext& context);
};

const Instance kInstances[] = {
#define FA_INSTANCE(T, dtype, head_dim, variant) \
  {dtype, head_dim, Variant::variant, launch_instance<T, head_dim, Variant::variant>},
#include "kernels/prefill_sm90/instances.def"
#undef FA_INSTANCE
};

Variant variant_of(const AttentionParams& p) {
  const bool row_mask = p.mask.present && p.mask.shape[2] > 1 && p.mask.stride[2] != 0;  // else the producer reads it
  const bool modified = row_mask || p.bias.present || p.alibi_slopes.present || p.softcap != 0.0f || p.softmax_scale <= 0.0f;
  return modified ? Variant::kModified : Variant::kPlain;
}

int64_t bucket_size(const AttentionParams& p) { return std::max(p.query.shape[3], p.value.shape[3]); }

/// Keys that a row sees, on average, as far as the host knows.
int64_t mean_keys(const AttentionParams& p) {
  int64_t keys = p.key.shape[2];
  if (p.window_right >= 0) keys -= std::min(keys, p.query.shape[2]) / 2;
  if (p.window_left >= 0) keys = std::min(keys, p.window_left + std::max<int64_t>(p.window_right, 0) + 1);
  return keys;
}

/// Are short tiles the faster ones? Where there are few rows, small blocks fill the GPU. Where there are few keys, those of
/// narrow heads hide each other's start and end, and wide heads gain from keys that come in small portions.
bool is_short(const AttentionParams& p, const DeviceInfo& device) {
  const int64_t long_tiles = (p.query.shape[2] + kLongTile - 1) / kLongTile * p.query.shape[1] * p.query.shape[0];
  const bool few_rows = long_tiles <= device.num_sms, causal = p.window_right >= 0;
  const bool unlike = causal || p.kv_lengths.present || p.mask.present;
  if (bucket_size(p) <= 64) return few_rows || mean_keys(p) <= (unlike ? kFewKeysUnlike : kFewKeys);
  if (bucket_size(p) <= 128) return few_rows;
  return causal && mean_keys(p) <= kFewKeys;
}

/// The smallest instance that takes the problem; null where none does.
const Instance* find_instance(const AttentionParams& p, const DeviceInfo& device) {
  const Instance* best = nullptr;
  const Variant variant = variant_of(p);
  const bool short_tiles = variant == Variant::kPlain && is_short(p, device);
  for (const Instance& instance : kInstances) {
    const bool right = instance.variant == variant || (short_tiles && instance.variant == Variant::kShort);
    if (instance.dtype != p.query.dtype || !right || instance.head_dim < bucket_size(p)) continue;
    const bool better = best == nullptr || instance.head_dim < best->head_dim ||
                        (instance.head_dim == best->head_dim && instance.variant == Variant::kShort);
    if (better) best = &instance;
  }
  return best;
}

}  // namespace

std::string supports(const AttentionParams& p, const DeviceInfo& device) {
  if (device.compute_capability != 90) return "needs compute capability 9.0 (Hopper)";
  if (p.query.dtype == DType::kFloat32) return "takes float16 and bfloat16 only, the tensors are float32";
  if (find_instance(p, device) == nullptr) return "head_dim " + std::to_string(bucket_size(p)) + " is above 256";
  if (device.shared_memory_bytes < kSharedLimit)
    return "needs " + std::to_string(kSharedLimit) + " bytes of shared memory in a thread block";
  if (p.query.shape[3] % 8 != 0 || p.value.shape[3] % 8 != 0) {
    return "head_dim " + std::to_string(p.query.shape[3]) + " and head_dim_v " + std::to_string(p.value.shape[3]) +
           " must be multiples of 8: the copy engine (TMA) moves 16 bytes";
  }
  if (p.key.shape[2] == 0) return "there are no keys";
  if (p.query.shape[2] > kMaxRows || p.key.shape[2] > kMaxRows) return "more than 2^29 rows or keys";
  const std::pair<const char*, const TensorView*> tensors[] = {
      {"query", &p.query}, {"key", &p.key}, {"value", &p.value}, {"out", &p.out}};
  for (const auto& [name, tensor] : tensors) {
    const std::string obstacle = tensor_map_obstacle(*tensor);
    if (!obstacle.empty()) return std::string("the copy engine (TMA) can't address ") + name + ", which " + obstacle;
  }
  const int64_t tiles = (p.query.shape[2] / 64 + num_sequences(p)) * p.query.shape[1] * num_sequences(p);
  if (tiles > std::numeric_limits<int32_t>::max()) return "more than 2^31 tiles of rows";
  return "";
}

size_t workspace_bytes(const AttentionParams&, const DeviceInfo&) { return kCounterBytes; }

Status launch(const AttentionParams& params, const ExecutionContext& context) {
  return find_instance(params, context.device)->launch(params, context);
}

}  // namespace fa::prefill_sm90
