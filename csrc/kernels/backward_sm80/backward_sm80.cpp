// SPDX-License-Identifier: Apache-2.0
// Chooses an instance of the backward kernels for mma.sync, plans their workspace and launches them one after the other.
#include "kernels/backward_sm80/backward_sm80.h"

#include <algorithm>
#include <limits>

#include "dispatch.h"
#include "kernels/backward_rows/backward_rows.h"
#include "kernels/backward_sm80/instances.h"
#include "kernels/common/aligned_rows.h"
#include "kernels/common/launch.h"
#include "kernels/common/smallest_instance.h"

namespace fa::backward_sm80 {
namespace {

// Of the sums of dQ, of which each split has its own.
constexpr int64_t kMostSplits = 32;
constexpr int64_t kMostBytesOfSums = int64_t{2} << 30;

struct Instance {
  DType dtype;
  int head_dim;  // bucket: the largest head_dim and head_dim_v it takes
  Variant variant;
  cudaError_t (*launch)(const AttentionParams&, const Gradients&, const Grid&, unsigned, unsigned, cudaStream_t);

  int element_bytes() const { return static_cast<int>(size_of(dtype)); }
  TileShape tile() const { return tile_shape(element_bytes(), head_dim, variant); }
  int shared_bytes() const { return shared_memory_bytes(element_bytes(), head_dim, tile()); }
};

const Instance kInstances[] = {
#define FA_INSTANCE(T, dtype, head_dim, variant) {dtype, head_dim, Variant::variant, launch_tiles<T, head_dim, Variant::variant>},
#include "kernels/backward_sm80/instances.def"
#undef FA_INSTANCE
};

using LaunchSums = cudaError_t (*)(const AttentionParams&, const Gradients&, const Grid&, const ScoreSums&, unsigned,
                                   cudaStream_t);

/// Of the instance's dtype and bucket.
LaunchSums sums_of(const Instance& instance) {
#define FA_INSTANCE(T, its_dtype, its_head_dim, variant) \
  if (instance.dtype == its_dtype && instance.head_dim == its_head_dim) return launch_sums<T, its_head_dim>;
#include "kernels/backward_sm80/instances.def"
#undef FA_INSTANCE
  return nullptr;
}

bool is_of_one_product(const AttentionParams& p) {
  return p.query.dtype == DType::kFloat32 && p.float32_precision == Float32Precision::kTf32;
}

/// Does every row see all keys, and so many that the rounding of the output is the mean of many?
bool sees_all_of_many(const AttentionParams& p) {
  const bool has_lengths = p.kv_lengths.present || p.query_lengths.present || p.cu_seqlens_q.present || p.cu_seqlens_kv.present;
  return p.key.shape[2] > kFewKeys && !hides_keys(p) && !has_lengths;
}

bool needs_modified(const AttentionParams& p, const Gradients& g) {
  return p.mask.present || p.bias.present || p.alibi_slopes.present || p.softcap != 0.0f || needs_exact_deltas(p, g) ||
         (is_of_one_product(p) && !sees_all_of_many(p));
}

int64_t head_dim_of(const AttentionParams& p) { return std::max(p.query.shape[3], p.value.shape[3]); }

const Instance* find(const AttentionParams& p, Variant variant) {
  return smallest_instance(
      kInstances, p, [&](const Instance& instance) { return instance.dtype == p.query.dtype && instance.variant == variant; });
}

/// The fastest one that suits the problem and, if any does, the device. Null: head_dim is too large.
const Instance* best_instance(const AttentionParams& p, const Gradients& g, const Device& device) {
  const Instance* best = nullptr;
  const bool modified = needs_modified(p, g);
  for (Variant variant : {is_of_one_product(p) ? Variant::kTf32 : Variant::kPlain, Variant::kCompact, Variant::kModified}) {
    if (modified && variant != Variant::kModified) continue;
    const Instance* instance = find(p, variant);
    if (instance == nullptr) continue;
    best = instance;
    if (best->shared_bytes() <= device.shared_memory_bytes) break;
  }
  return best;
}

/// Tiles of keys of the longest sequence, or where packed of one of mean length.
int64_t key_tiles(const AttentionParams& p, int tile_k) {
  const int64_t keys = p.cu_seqlens_kv.present ? p.key.shape[2] / std::max<int64_t>(1, num_sequences(p)) : p.key.shape[2];
  return (keys + tile_k - 1) / tile_k;
}

int64_t bytes_of_sums(const Instance& instance, const RowTiles& tiles, const AttentionParams& p) {
  return p.query.shape[1] * tiles.of_head * tiles.tile_rows * instance.head_dim * int64_t{sizeof(float)};
}

/// Thread blocks that the device runs at once.
int64_t num_places(const Instance& instance, const Device& device) {
  const int fitting = std::max(1, std::min(instance.tile().min_blocks, device.shared_memory_bytes / instance.shared_bytes()));
  return int64_t{fitting} * std::max(1, device.num_sms);
}

/// Among how many thread blocks the keys of a pair of sequence and key head are dealt out: so many that the multiprocessors are
/// busy to the end, and few, since each has sums of its own of all dQ. Lengths of packed sequences are not known here: assumed is
/// that the multiprocessors share all tiles evenly, and at the end wait for a block of a sequence twice as long as the mean.
int64_t num_splits(const Instance& instance, const RowTiles& rows, const AttentionParams& p, const Device& device) {
  const TileShape tile = instance.tile();
  const int64_t places = num_places(instance, device), pairs = num_sequences(p) * p.key.shape[1];
  const int64_t tiles = key_tiles(p, tile.tile_k()), bytes = std::max<int64_t>(1, bytes_of_sums(instance, rows, p));
  const int64_t most = std::min({tiles, kMostSplits, std::max<int64_t>(1, kMostBytesOfSums / bytes)});
  const bool is_packed = p.cu_seqlens_kv.present;
  int64_t best = 1;
  double best_time = 0;
  for (int64_t splits = 1; splits <= most; ++splits) {
    const int64_t rounds = (pairs * splits + places - 1) / places, of_block = (tiles + splits - 1) / splits;
    const double in_turn = is_packed ? static_cast<double>(pairs * tiles) / static_cast<double>(places) + 2.0 * of_block
                                     : static_cast<double>(rounds * of_block);
    const double time = in_turn * (1.0 + (is_packed ? 0.03 : 0.01) * static_cast<double>(splits));
    if (splits == 1 || time < best_time) best = splits, best_time = time;
  }
  return best;
}

/// Steps of the mean split for one head of its group: tiles of rows that see some of its keys, over its tiles of keys.
int64_t steps_of_split(const Instance& instance, const AttentionParams& p, int64_t splits) {
  const TileShape tile = instance.tile();
  const Sequence sequence = sequence_rule(p).at(0);
  const int rows = static_cast<int>(p.query.shape[2]), keys = static_cast<int>(p.key.shape[2]);
  int64_t steps = 0;
  for (int key = 0; key < keys; key += tile.tile_k()) {
    const KeySpan seen = tiles_that_see(sequence.mask.band(), rows, keys, key, key + tile.tile_k(), tile.tile_q);
    steps += seen.end - seen.begin;
  }
  return steps / splits;
}

/// Who helps the splits, if anyone; without arrays. How long a sequence is must be known here, for a helper's part doesn't shrink
/// with it.
Helpers helpers_of(const Instance& instance, const AttentionParams& p, const Device& device, int64_t splits) {
  // What a tile of keys takes beside its steps, in steps; and one of which the gradients are two parts.
  constexpr int64_t kOfTile = 1, kOfParts = 2;
  Helpers helpers{};
  const int64_t pairs = num_sequences(p) * p.key.shape[1], blocks = pairs * splits;
  const int64_t left = std::min(num_places(instance, device) - blocks, pairs);
  const bool has_lengths = p.kv_lengths.present || p.query_lengths.present || p.query_offsets.present || p.cu_seqlens_q.present;
  if (splits == 1 || left <= 0 || has_lengths) return helpers;
  const int64_t tiles = key_tiles(p, instance.tile().tile_k()), group = p.query.shape[1] / p.key.shape[1];
  const int64_t pairs_of_one = (pairs + left - 1) / left, helped = pairs_of_one * splits;
  const int64_t steps = group * steps_of_split(instance, p, splits);
  const int64_t row_tiles = (steps + kOfTile * tiles / splits - kOfParts * helped) / (helped + 1) / group;
  if (row_tiles <= 0) return helpers;
  helpers.row_tiles = static_cast<int>(row_tiles);
  helpers.first_block = static_cast<int>(blocks);
  helpers.pairs_of_one = static_cast<int>(pairs_of_one);
  return helpers;
}

/// The arrays of a workspace; all of them null where `memory` is.
struct Arrays {
  RowNumbers numbers;
  int64_t splits;
  Helpers helpers;
  float* d_query;
  size_t bytes;

  int64_t num_arrivals() const { return helpers.exist() ? helpers.first_block : 0; }
};

Arrays arrays_of(const Instance& instance, const AttentionParams& p, const Device& device, void* memory) {
  Workspace workspace(memory);
  const TileShape tile = instance.tile();
  Arrays arrays{row_numbers(p, tile.tile_q, instance.variant == Variant::kModified, &workspace), 1, {}, nullptr, 0};
  arrays.splits = num_splits(instance, arrays.numbers.tiles, p, device);
  const bool is_summed = p.key.shape[2] > tile.tile_k();
  arrays.helpers = helpers_of(instance, p, device, arrays.splits);
  const int64_t num_sums = !is_summed ? 0 : arrays.helpers.exist() ? arrays.splits + 1 : arrays.splits;
  const int64_t bytes = num_sums * bytes_of_sums(instance, arrays.numbers.tiles, p);
  arrays.d_query = workspace.take<float>(bytes / static_cast<int64_t>(sizeof(float)));
  arrays.helpers.parts = workspace.take<float>(arrays.num_arrivals() * 4 * tile.tile_k() * instance.head_dim);
  arrays.helpers.arrivals = workspace.take<unsigned>(arrays.num_arrivals());
  arrays.bytes = workspace.bytes();
  return arrays;
}

Grid grid_of(const Instance& instance, const AttentionParams& p, const Gradients& g, const Arrays& arrays) {
  Grid grid{};
  grid.sequences = sequence_rule(p);
  grid.heads = Divisor(p.key.shape[1]);
  grid.group_size = Divisor(p.query.shape[1] / p.key.shape[1]);
  grid.num_splits = Divisor(arrays.splits);
  grid.numbers = arrays.numbers;
  grid.helpers = arrays.helpers;
  grid.d_query = arrays.d_query;
  grid.size_of_sums = bytes_of_sums(instance, arrays.numbers.tiles, p) / static_cast<int64_t>(sizeof(float));
  grid.query_by_16 = is_by(p.query, 16);
  grid.key_by_16 = is_by(p.key, 16);
  grid.value_by_16 = is_by(p.value, 16);
  grid.d_out_by_16 = is_by(g.d_out, 16);
  grid.d_query_by_16 = is_by(g.d_query, 16);
  grid.d_key_by_16 = is_by(g.d_key, 16);
  grid.d_value_by_16 = is_by(g.d_value, 16);
  grid.may_spoil = hides_keys(p);
  return grid;
}

Status too_many(int64_t blocks) {
  if (blocks <= std::numeric_limits<int32_t>::max()) return {};
  return {StatusCode::kUnsupported, "The problem has " + std::to_string(blocks) + " tiles, at most 2^31 - 1 can be launched."};
}

Status launch_sums_of(const Instance& instance, const AttentionParams& p, const Gradients& g, const Grid& grid,
                      const ScoreSums& sums, int64_t blocks, cudaStream_t stream) {
  if (Status status = too_many(blocks); !status.ok() || blocks == 0) return status;
  return cuda_status(sums_of(instance)(p, g, grid, sums, static_cast<unsigned>(blocks), stream),
                     "Sums of the backward pass could not be launched");
}

/// Are D and the log-sum-exp to be computed anew, as sums over the keys of each row? So they are also where the output given is
/// of one product and the gradients are of three, and for long heads in float32.
bool needs_row_sums(const Instance& instance, const AttentionParams& p, const Gradients& g) {
  const bool is_approximate = is_of_one_product(p) || has_long_products(instance.element_bytes(), instance.head_dim);
  return needs_exact_deltas(p, g) || (is_approximate && instance.variant == Variant::kModified);
}

/// D of each row, summed up over its keys.
Status sum_rows(const Instance& instance, const AttentionParams& p, const Gradients& g, const Grid& grid, cudaStream_t stream) {
  ScoreSums sums{};
  sums.of_rows = sums.shared[3] = true;
  return launch_sums_of(instance, p, g, grid, sums, p.query.shape[1] * grid.numbers.tiles.of_head, stream);
}

Status sum_bias(const Instance& instance, const AttentionParams& p, const Gradients& g, const Grid& grid, cudaStream_t stream) {
  const TileShape tile = instance.tile();
  ScoreSums sums{};
  sums.sum = g.d_bias;
  int64_t count[4];
  for (int axis = 0; axis < 4; ++axis) {
    sums.shared[axis] = is_summed(sums.sum, axis);
    count[axis] = sums.shared[axis] ? 1 : sums.sum.shape[axis];
  }
  sums.heads = static_cast<unsigned>(count[1]);
  sums.blocks_of_rows = static_cast<unsigned>((count[2] + tile.tile_q - 1) / tile.tile_q);
  sums.blocks_of_keys = static_cast<unsigned>((count[3] + tile.tile_k() - 1) / tile.tile_k());
  const int64_t blocks = count[0] * count[1] * sums.blocks_of_rows * sums.blocks_of_keys;
  return launch_sums_of(instance, p, g, grid, sums, blocks, stream);
}

}  // namespace

bool plan(const StepParams& params, const Gradients& gradients, BackwardPlan* plan, std::string* why_not) {
  constexpr int64_t kMaxRows = int64_t{1} << 29;  // RowBand: sums of two positions fit 32 bits
  const int capability = plan->device.compute_capability, shared_bytes = plan->device.shared_memory_bytes;
  FA_REFUSE_IF(capability < 80, "needs compute capability 8.0 or newer, the device has " + std::to_string(capability / 10) + "." +
                                    std::to_string(capability % 10));
  FA_REFUSE_IF(params.query.shape[2] > kMaxRows || params.key.shape[2] > kMaxRows, "more than 2^29 rows or keys");
  const Instance* instance = best_instance(params, gradients, plan->device);
  FA_REFUSE_IF(instance == nullptr, "head_dim " + std::to_string(head_dim_of(params)) + " is above 256");
  FA_REFUSE_IF(instance->shared_bytes() > shared_bytes, "needs " + std::to_string(instance->shared_bytes()) +
                                                            " bytes of shared memory in a thread block, the device gives " +
                                                            std::to_string(shared_bytes));
  plan->instance = static_cast<int>(instance - kInstances);
  plan->workspace_bytes = arrays_of(*instance, params, plan->device, nullptr).bytes;
  return true;
}

Status launch(const BackwardPlan& plan, const StepParams& params, const Gradients& gradients, const ExecutionContext& context) {
  const Instance& instance = kInstances[plan.instance];
  const Arrays arrays = arrays_of(instance, params, plan.device, context.workspace);
  const auto stream = static_cast<cudaStream_t>(context.stream);
  const Status prepared =
      prepare_rows(params, gradients, arrays.numbers, arrays.helpers.arrivals, arrays.num_arrivals(), context);
  if (!prepared.ok()) return prepared;
  const int64_t pairs = num_sequences(params) * params.key.shape[1];
  const bool has_keys = pairs > 0 && params.key.shape[2] > 0;
  const Grid grid = has_keys ? grid_of(instance, params, gradients, arrays) : Grid{};
  if (has_keys && needs_row_sums(instance, params, gradients)) {
    Status status = sum_rows(instance, params, gradients, grid, stream);
    if (!status.ok()) return status;
  }
  const int64_t helpers = arrays.helpers.exist() ? (pairs - 1) / arrays.helpers.pairs_of_one + 1 : 0;
  const int64_t blocks = has_keys ? pairs * arrays.splits + helpers : 0,
                row_tiles = params.query.shape[1] * arrays.numbers.tiles.of_head;
  if (Status status = too_many(std::max(blocks, row_tiles)); !status.ok()) return status;
  if (blocks > 0) {
    const cudaError_t error =
        instance.launch(params, gradients, grid, static_cast<unsigned>(blocks), static_cast<unsigned>(row_tiles), stream);
    if (error != cudaSuccess) return cuda_status(error, "The backward kernel could not be launched");
  }
  if (gradients.d_bias.present) {
    Status status = sum_bias(instance, params, gradients, grid, stream);
    if (!status.ok()) return status;
  }
  return gradients.d_sinks.present ? d_sinks_of_rows(params, gradients, arrays.numbers, context) : Status{};
}

}  // namespace fa::backward_sm80
