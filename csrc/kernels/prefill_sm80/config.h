// SPDX-License-Identifier: Apache-2.0
// The tile table of the mma.sync kernels: one row for each element type and head_dim bucket. Read by the kernel (as template
// argument) and by the host (for grids and shared memory). Shared memory stays within 99 KB, the limit of sm_86 and sm_89.
#pragma once

#include <cstdint>

namespace fa::prefill_sm80 {

/// What a tile of query rows is to the kernel.
enum class Variant : uint8_t {
  kPlain,     // scale, lengths, window: scores stay raw products, the scale is folded into the exponent
  kModified,  // on top of it softcap, bias, mask, ALiBi, or a scale <= 0: scores are natural
  kTf32,      // float32 as kModified, in one TF32 product in place of three
  kSplit,     // as kModified; keys split over thread blocks, the query heads of one key head share a tile
};

struct TileShape {
  int warps;  // each has row_blocks * 16 query rows, and of their output a part of the columns
  int row_blocks;
  int tile_kv;     // keys, a multiple of 32
  int slots;       // of shared memory for K and V tiles, used in turn: K0 V0 K1 V1 …
  int min_blocks;  // thread blocks per multiprocessor the registers must allow
  bool query_in_registers;
  int column_groups = 1;  // warps that share rows: each computes all of their scores

  constexpr int row_warps() const { return warps / column_groups; }
  constexpr int tile_q() const { return row_warps() * row_blocks * 16; }
  constexpr int threads() const { return warps * 32; }
};

constexpr TileShape tile_shape(int element_bytes, int head_dim, Variant variant) {
  if (element_bytes == 4) {
    if (variant == Variant::kSplit) return head_dim <= 128 ? TileShape{1, 1, 32, 3, 1, false} : TileShape{1, 1, 32, 2, 1, false};
    if (head_dim <= 64) return variant == Variant::kTf32 ? TileShape{4, 2, 32, 4, 2, false} : TileShape{4, 1, 32, 4, 2, false};
    if (head_dim <= 128) return {4, 1, 32, 3, 2, false};
    return {2, 1, 32, 2, 2, false};
  }
  if (variant == Variant::kSplit) return head_dim <= 128 ? TileShape{1, 1, 32, 4, 4, false} : TileShape{1, 1, 32, 3, 4, false};
  const bool modified = variant == Variant::kModified;  // holds a tile of biases, too
  if (head_dim <= 64) return modified ? TileShape{4, 2, 64, 4, 2, false} : TileShape{4, 2, 64, 4, 3, false};
  if (head_dim <= 128) return modified ? TileShape{4, 2, 32, 4, 2, false} : TileShape{4, 2, 64, 3, 2, false};
  if (head_dim <= 192) return {4, 1, 64, 3, 2, false};
  if (head_dim <= 256) return {4, 1, 64, 2, 2, false};
  return {4, 1, 32, 2, 1, false, 2};
}

constexpr int shared_memory_bytes(int element_bytes, int head_dim, const TileShape& tile) {
  return element_bytes * head_dim * (tile.tile_q() + tile.slots * tile.tile_kv);
}

}  // namespace fa::prefill_sm80
