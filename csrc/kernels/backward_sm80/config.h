// SPDX-License-Identifier: Apache-2.0
// The tile table of the backward kernels for mma.sync: one row for each head_dim bucket and variant. Read by the kernels (as
// template argument) and by the host (for workspace and shared memory).
#pragma once

#include <cstdint>

namespace fa::backward_sm80 {

/// What a tile of scores is to the kernel.
enum class Variant : uint8_t {
  kPlain,     // scale, lengths, windows
  kModified,  // on top of it softcap, bias, mask, ALiBi, and gradients of biases and sinks; also where the others have no room
  kTf32,      // float32 as kPlain, in one TF32 product in place of three
  kCompact,   // as kPlain, in the shared memory of compute capability 8.0
};

/// Which scores a warp computes.
enum class Scores : uint8_t {
  kOwn,   // those of keys that no other warp has
  kAll,   // two warps have the same keys: all of their scores, so both compute the same
  kHalf,  // two warps have the same keys: those of one half of the rows, and the other warp gives the rest
};

/// A thread block owns a tile of keys, of which each warp has key_blocks * 16, and walks over tiles of query rows. Of two warps
/// that have the same keys each has one half of the columns of their gradients.
struct TileShape {
  int warps;
  int key_blocks;
  int tile_q;      // query rows
  int min_blocks;  // thread blocks per multiprocessor the registers must allow
  Scores scores = Scores::kOwn;
  int score_stages = 2;  // of gradients of scores: with two, a warp stores a tile's while others read those of the one before

  constexpr int column_groups() const { return scores == Scores::kOwn ? 1 : 2; }
  constexpr int tile_k() const { return warps / column_groups() * key_blocks * 16; }
  constexpr int threads() const { return warps * 32; }
};

constexpr TileShape tile_shape(int element_bytes, int head_dim, Variant variant) {
  const bool plain = variant != Variant::kModified, has_room = variant == Variant::kPlain;
  if (element_bytes == 4) {
    if (head_dim <= 64) return {4, 1, 32, 2};
    if (head_dim <= 128) return plain ? TileShape{8, 1, 32, 1} : TileShape{4, 1, 32, 1};
    return {4, 1, 16, 1, Scores::kAll};
  }
  if (head_dim <= 64) return plain ? TileShape{4, 2, 32, 2} : TileShape{8, 1, 32, 1};
  if (head_dim <= 128) return plain ? TileShape{8, 2, 64, 1, Scores::kHalf, has_room ? 2 : 1} : TileShape{4, 1, 32, 2};
  return plain ? TileShape{8, 1, has_room ? 64 : 32, 1, Scores::kHalf} : TileShape{8, 1, 32, 1, Scores::kAll};
}

/// Are the products of float32 rows so long that their rounding shows where they cancel against D or the log-sum-exp? Both are
/// then made of the same products (score_sums.cuh). These head sizes have no plain instance: it has no room for what corrects a
/// log-sum-exp.
constexpr bool has_long_products(int element_bytes, int head_dim) { return element_bytes == 4 && head_dim > 128; }

/// Keys, values, and two stages of queries, gradients of the output and the rows' numbers; gradients of a tile of scores and,
/// where warps exchange them, its weights.
constexpr int shared_memory_bytes(int element_bytes, int head_dim, const TileShape& tile) {
  const int scores = tile.tile_k() * tile.tile_q;
  const int tiles_of_scores = tile.score_stages + (tile.scores == Scores::kHalf ? 1 : 0);
  const int elements = 2 * (tile.tile_k() + 2 * tile.tile_q) * head_dim + tiles_of_scores * scores;
  return element_bytes * elements + 2 * 3 * 4 * tile.tile_q;
}

constexpr bool fits(int element_bytes, int head_dim, Variant variant, int kilobytes) {
  return shared_memory_bytes(element_bytes, head_dim, tile_shape(element_bytes, head_dim, variant)) <= 1024 * kilobytes;
}

// Of a block's shared memory, compute capability 8.0 gives 163 KB, 8.6 and 8.9 give 99, 9.0 and 10.0 227 (docs/backward.md).
static_assert(fits(2, 128, Variant::kModified, 99) && fits(4, 64, Variant::kModified, 99) && fits(4, 64, Variant::kTf32, 99));
static_assert(fits(2, 128, Variant::kCompact, 163) && fits(2, 256, Variant::kCompact, 163) &&
              fits(2, 256, Variant::kModified, 163) && fits(4, 128, Variant::kModified, 163) &&
              fits(4, 256, Variant::kModified, 163));
static_assert(fits(2, 128, Variant::kPlain, 227) && fits(2, 256, Variant::kPlain, 227) && fits(4, 128, Variant::kPlain, 227));

}  // namespace fa::backward_sm80
