// SPDX-License-Identifier: Apache-2.0
// What a thread block of the backward kernels for mma.sync knows: how its shared memory is laid out, its walk over the tiles of
// query rows that see a tile of keys, and where its warps wait for one another.
#pragma once

#include <type_traits>

#include "kernels/backward_sm80/config.h"
#include "kernels/backward_sm80/float_products.cuh"
#include "kernels/backward_sm80/products.cuh"
#include "kernels/backward_sm80/scores.cuh"
#include "kernels/backward_sm80/tiles.cuh"
#include "kernels/common/mbarrier.cuh"

namespace fa::backward_sm80 {

template <class T_, int kHeadDim_, Variant kVariant>
struct TileConfig {
  using T = T_;
  static constexpr int kElementBytes = sizeof(T);
  static constexpr TileShape kTile = tile_shape(kElementBytes, kHeadDim_, kVariant);
  static constexpr bool kModified = kVariant == Variant::kModified, kOneProduct = kVariant == Variant::kTf32;
  static constexpr int kHeadDim = kHeadDim_, kThreads = kTile.threads(), kWarps = kTile.warps, kKeyBlocks = kTile.key_blocks;
  static constexpr int kTileQ = kTile.tile_q, kTileK = kTile.tile_k(), kColumns = kHeadDim / kTile.column_groups();
  static constexpr bool kExchanges = kTile.scores == Scores::kHalf;
  static constexpr int kRows = kExchanges ? kTileQ / 2 : kTileQ;  // of which a warp computes scores
  using LayoutK = TileLayout<kTileK, kHeadDim * kElementBytes, RowOrder::kNeighbours>;
  using LayoutQ = TileLayout<kTileQ, kHeadDim * kElementBytes, RowOrder::kNeighbours>;
  // Gradients of scores: by keys, or in float32, which ldmatrix doesn't transpose, by rows.
  using LayoutS = std::conditional_t<kElementBytes == 2, TileLayout<kTileK, kTileQ * 2, RowOrder::kNeighbours>,
                                     TileLayout<kTileQ, kTileK * 4, RowOrder::kNeighbours>>;
  using CopyK = prefill_sm80::TileCopy<T, LayoutK, kTileK, kThreads>;
  using CopyQ = prefill_sm80::TileCopy<T, LayoutQ, kTileQ, kThreads>;
  using Products =
      std::conditional_t<kElementBytes == 2, backward_sm80::Products<TileConfig>, backward_sm80::FloatProducts<TileConfig>>;

  static constexpr int kKeyWarps = kWarps / kTile.column_groups();
  static __device__ __forceinline__ int first_key() { return threadIdx.x / 32 % kKeyWarps * 16 * kKeyBlocks; }  // of the warp
  static __device__ __forceinline__ int column_group() { return kKeyWarps == kWarps ? 0 : threadIdx.x / 32 / kKeyWarps; }
  static __device__ __forceinline__ int first_row() { return kExchanges ? column_group() * kRows : 0; }  // of the tile
  /// The other warp that has the same keys may read what this one has stored.
  static __device__ __forceinline__ void tell_other() {
    asm volatile("bar.arrive %0, 64;" ::"r"(1 + threadIdx.x / 32 % kKeyWarps + kKeyWarps * (1 - column_group())) : "memory");
  }
  /// Waits until this warp may read what the other has stored.
  static __device__ __forceinline__ void hear_other() {
    asm volatile("bar.sync %0, 64;" ::"r"(1 + threadIdx.x / 32 % kKeyWarps + kKeyWarps * column_group()) : "memory");
  }

  // Shared memory: offsets in bytes.
  static constexpr int kValue = LayoutK::kBytes, kStages = 2 * LayoutK::kBytes, kStage = 2 * LayoutQ::kBytes;
  static constexpr int kScores = kStages + 2 * kStage, kWeights = kScores + kTile.score_stages * LayoutS::kBytes;
  static constexpr int kNumbers = kWeights + (kExchanges ? LayoutS::kBytes : 0), kNumbersOfStage = 3 * 4 * kTileQ;
  static constexpr int kSharedBytes = kNumbers + 2 * kNumbersOfStage;
  static_assert(kSharedBytes == shared_memory_bytes(kElementBytes, kHeadDim, kTile));
  /// Where a stage's gradients of scores are, behind the first ones.
  static __device__ __forceinline__ int place_of_d_scores(int stage) {
    return kTile.score_stages == 1 ? 0 : stage * LayoutS::kBytes;
  }
};

/// A step of the walk: a tile of rows of a head.
struct Step {
  int head, row_tile;
  int stage;  // of shared memory: two that take turns; also the parity of the step's phase in StepBarriers
};

/// Where the warps of a block wait for one another, in each step once. What a warp waits for the others did some time before, so
/// one may be ahead of another, and its exponentials run beside the other's products. Every thread arrives itself, and waits for
/// every phase, because compute-sanitizer follows an access only to an arrival of the thread that made it.
template <class Config>
struct StepBarriers {
  static constexpr bool kOneStage = Config::kTile.score_stages == 1;
  Mbarrier<Config::kThreads> ready;  // the next step's tiles and the gradients of the step's scores are in shared memory
  Mbarrier<Config::kThreads> left;   // the step's tiles and weights have been read
  Mbarrier<Config::kThreads> added;  // with one stage of gradients of scores: the step's have been read, too

  __device__ __forceinline__ void init() { ready.init(), left.init(), added.init(); }
  __device__ __forceinline__ void arrive_behind_sums() {
    if constexpr (kOneStage) added.arrive();
  }
  __device__ __forceinline__ void wait_for_sums(int stage) {
    if constexpr (kOneStage) added.wait(stage);
  }
};

/// The step behind or, with `by` 1, before another in a walk over the tiles `rows`, from the last to the first, in one head after
/// the other.
__device__ __forceinline__ Step neighbour(const Step& step, KeySpan rows, int by) {
  const int row_tile = step.row_tile + by;
  if (row_tile >= rows.begin && row_tile < rows.end) return {step.head, row_tile, step.stage ^ 1};
  return {step.head - by, by < 0 ? rows.end - 1 : rows.begin, step.stage ^ 1};
}

/// Where a thread copies the rows of a step from: its first chunk of them.
template <class T>
struct RowSource {
  const T *query, *d_out;
};

/// What stays the same for a tile of keys; in shared memory.
struct Walk {
  KeyTile keys;
  int first_head, num_steps, first_stage;
  float* d_query;      // the sums of the block's split, or of the pair's helper
  float* part;         // null: the block has all rows; else where its part of dK and dV goes …
  const float* other;  // … where the other block's is …
  unsigned* arrivals;  // … and how many of both are there
};

/// With the i-th of a split's tiles of keys, or where the block `helps` its part of the first; behind the walk `before`.
template <class Config>
__device__ __forceinline__ Walk walk_of(const Grid& grid, const TileWork& work, unsigned pair, const KeySplit& split, int i,
                                        bool helps, const Walk& before) {
  const KeyTile keys = key_tile_of(work, split, i, grid.helpers, helps, Config::kTileQ, Config::kTileK);
  const int group = grid.group_size.divisor;
  Walk walk{keys,
            work.kv_head * group,
            group * (keys.rows.end - keys.rows.begin),
            (before.first_stage + before.num_steps) % 2,
            grid.d_query + (helps ? split.num_splits : split.split) * grid.size_of_sums,
            nullptr,
            nullptr,
            nullptr};
  if (i == 0 && grid.helpers.exist()) {
    constexpr int kPart = 2 * Config::kTileK * Config::kHeadDim;
    const int64_t helped = int64_t{pair} * split.num_splits + split.split;
    float* const parts = grid.helpers.parts + 2 * kPart * helped;
    walk.part = parts + (helps ? kPart : 0);
    walk.other = parts + (helps ? 0 : kPart);
    walk.arrivals = grid.helpers.arrivals + helped;
  }
  return walk;
}

/// What stays the same for a block.
template <class Config>
struct Block {
  using T = typename Config::T;

  const AttentionParams& p;
  const Gradients& g;
  const Grid& grid;
  TileWork& work;  // in shared memory: in registers it would be spilled from the main loop
  unsigned char* shared;
  Lanes lanes;

  __device__ __forceinline__ Block(const AttentionParams& p, const Gradients& g, const Grid& grid, TileWork& work,
                                   unsigned char* shared)
      : p(p), g(g), grid(grid), work(work), shared(shared) {
    lanes = Config::Products::lanes(address(0), address(Config::kStages), address(Config::kScores)).kept();
  }

  __device__ __forceinline__ uint32_t address(int offset) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + offset;
  }
  /// Its number among RowTiles.
  __device__ __forceinline__ int tile_of(const Step& step) const {
    return step.head * static_cast<int>(grid.numbers.tiles.of_head) + work.first_tile + step.row_tile;
  }
  __device__ __forceinline__ RowSource<T> source_of(const Step& step) const {
    using Copy = typename Config::CopyQ;
    const int64_t b = work.sequence.batch_idx, row = work.sequence.first_row + step.row_tile * Config::kTileQ;
    return {source_of_rows<Copy, T>(p.query, b, step.head, row), source_of_rows<Copy, T>(g.d_out, b, step.head, row)};
  }
  /// Where the thread copies the next step's rows from, given where it copied the step's.
  __device__ __forceinline__ void advance(RowSource<T>& source, const Step& step, const Step& next) const {
    if (next.head != step.head) {
      source = source_of(next);
    } else {
      source.query -= Config::kTileQ * p.query.stride[2], source.d_out -= Config::kTileQ * g.d_out.stride[2];
    }
  }
  __device__ __forceinline__ NumbersOfRows numbers(int stage) const {
    const float* first = reinterpret_cast<const float*>(shared + Config::kNumbers + stage * Config::kNumbersOfStage);
    first += Config::first_row() + 2 * (threadIdx.x % 4);
    return {first, first + Config::kTileQ, first + 2 * Config::kTileQ};
  }

  template <class Layout, int kRows>
  __device__ __forceinline__ void load(int tile, const TensorView& view, const T* source, int valid_rows, bool by_16) const {
    load_rows<T, Layout, kRows, Config::kThreads>(shared + tile, view, source, valid_rows, by_16);
  }
  __device__ __forceinline__ void load_keys(int first_key) const {
    using Copy = typename Config::CopyK;
    const int64_t b = work.sequence.batch_idx, row = work.sequence.first_key + first_key;
    const int valid = work.num_keys - first_key;
    const auto load_tile = [&](int tile, const TensorView& view, bool by_16) {
      load<typename Config::LayoutK, Config::kTileK>(tile, view, source_of_rows<Copy, T>(view, b, work.kv_head, row), valid,
                                                     by_16);
    };
    load_tile(0, p.key, grid.key_by_16);
    load_tile(Config::kValue, p.value, grid.value_by_16);
  }
  __device__ __forceinline__ void load_queries(const Step& step, const RowSource<T>& source) const {
    const int valid = static_cast<int>(work.sequence.query_length) - step.row_tile * Config::kTileQ;
    const int tile = Config::kStages + step.stage * Config::kStage;
    load<typename Config::LayoutQ, Config::kTileQ>(tile, p.query, source.query, valid, grid.query_by_16);
    load<typename Config::LayoutQ, Config::kTileQ>(tile + Config::LayoutQ::kBytes, g.d_out, source.d_out, valid,
                                                   grid.d_out_by_16);
    const int64_t entry = int64_t{tile_of(step)} * Config::kTileQ;
    const uint32_t numbers = address(Config::kNumbers + step.stage * Config::kNumbersOfStage);
    load_floats<Config::kTileQ>(numbers, grid.numbers.reference + entry);
    load_floats<Config::kTileQ>(numbers + 4 * Config::kTileQ, grid.numbers.delta + entry);
    if constexpr (Config::kModified) load_floats<Config::kTileQ>(numbers + 8 * Config::kTileQ, grid.numbers.rest + entry);
  }

  /// Waits until what the thread has copied to a stage, and `with_keys` to the tiles of keys and values, is there. In one TF32
  /// product each element becomes the nearest TF32 number, by the thread that copied it.
  __device__ __forceinline__ void end_copies(int stage, bool with_keys) const {
    cp_async_wait<0>();
    if constexpr (Config::kOneProduct) {
      using CopyK = typename Config::CopyK;
      using CopyQ = typename Config::CopyQ;
      if (!grid.copies_by_16()) __syncthreads();  // others have loaded what this thread rounds
      if (with_keys) round_copied<CopyK>(address(0)), round_copied<CopyK>(address(Config::kValue));
      const uint32_t tile = address(Config::kStages + stage * Config::kStage);
      round_copied<CopyQ>(tile), round_copied<CopyQ>(tile + Config::LayoutQ::kBytes);
    }
  }

  /// Rows whose weights are NaN for the keys that they see become 0 in shared memory, so that they give nothing to other keys.
  /// Each warp does it for itself.
  __device__ __forceinline__ void clear_spoilt_rows(int stage) const {
    const float* reference = reinterpret_cast<const float*>(shared + Config::kNumbers + stage * Config::kNumbersOfStage);
#pragma unroll
    for (int first = 0; first < Config::kTileQ; first += 32) {
      const int row = first + threadIdx.x % 32;
      unsigned spoilt = __ballot_sync(kAllLanes, row < Config::kTileQ && isnan(reference[row]));
      for (; spoilt != 0; spoilt &= spoilt - 1) {
        unsigned char* tile = shared + Config::kStages + stage * Config::kStage;
        clear_tile_row<typename Config::LayoutQ, Config::kTileQ>(tile, first + __ffs(spoilt) - 1);
        clear_tile_row<typename Config::LayoutQ, Config::kTileQ>(tile + Config::LayoutQ::kBytes, first + __ffs(spoilt) - 1);
        __syncwarp();
      }
    }
  }
};

}  // namespace fa::backward_sm80
