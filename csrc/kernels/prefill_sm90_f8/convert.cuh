// SPDX-License-Identifier: Apache-2.0
// The warps of prefill_sm90_f8 that transpose the values which the copy engine has brought: from a row for each key to a row for
// each column, with the values of 128 keys. In each 32 keys of such a row position 16 h + 4 t + 2 e + i has key
// 16 h + 8 e + 2 t + i (t < 4, the others < 2): then the thread that holds the scores of keys 2 t + i and 8 + 2 t + i holds the
// weights that the product wants of positions 4 t … + 3, and weights never leave their thread.
#pragma once

#include "kernels/common/mma.cuh"
#include "kernels/common/tma.cuh"
#include "kernels/prefill_sm90/epilogue.cuh"
#include "kernels/prefill_sm90_f8/shared_plan.cuh"

namespace fa::prefill_sm90_f8 {

/// 32 keys x 16 columns of a warp: what ldmatrix, transposing pairs of columns, gives a lane of four groups of eight keys: keys
/// 2 t and 2 t + 1 (t = lane % 4), columns 2 c and 2 c + 1 (c = lane / 4).
struct ValueBlock {
  uint32_t keys[4];

  /// Keys `used` … 31 become 0.
  __device__ __forceinline__ void clear_from(int used) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = 8 * i + threadIdx.x % 4 * 2;
      if (key >= used) keys[i] = 0;
      if (key + 1 >= used) keys[i] &= 0xffffu;
    }
  }

  /// To 16 rows of transposed values, 32 bytes each. A matrix of stmatrix has rows 0, 2, 4, 6, 9, 11, 13, 15 or the others: eight
  /// different rows under the swizzle, so that there is no bank conflict.
  __device__ __forceinline__ void store(uint32_t address) const {
    const bool upper = threadIdx.x % 32 >= 16;  // columns 8 … 15
    const uint32_t even = upper ? 0x7531 : 0x6420, odd = upper ? 0x6420 : 0x7531;
    prefill_sm90::store_matrices(address, __byte_perm(keys[0], keys[1], even), __byte_perm(keys[2], keys[3], even),
                                 __byte_perm(keys[0], keys[1], odd), __byte_perm(keys[2], keys[3], odd));
  }
};

/// This warp's share of a tile of values, of whose keys the first `used` are in use.
template <class C>
__device__ __forceinline__ void transpose_values(const uint8_t* raw, uint8_t* value, int converter, int used) {
  constexpr int kKeyGroups = C::kTileN / 32;
  const int lane = threadIdx.x % 32, i = lane % 8;
  // Reading, the lane names row lane % 8 of matrix lane / 8, which has keys 8 (lane / 8) …; writing, row i of its matrix.
  const uint32_t from = shared_address(raw) + lane * 128;
  const int row = (i < 4) == (lane < 16) ? 2 * i : 2 * i + 1, half = lane / 8 % 2;
  const uint32_t to = shared_address(value) + row * 128;
  const bool all = used >= C::kTileN;
#pragma unroll 1
  for (int chunk = converter; chunk < C::kHeadDim / 16; chunk += C::kConverters) {
    const uint32_t panel = from + chunk / 8 * (C::kTileN * 128), column = ((chunk % 8) ^ i) << 4;
    ValueBlock block[kKeyGroups];
#pragma unroll
    for (int group = 0; group < kKeyGroups; ++group) {
      ldmatrix_x4_transposed(block[group].keys, panel + group * (32 * 128) + column);
    }
#pragma unroll
    for (int group = 0; group < kKeyGroups; ++group) {
      if (!all) block[group].clear_from(used - 32 * group);
      block[group].store(to + chunk * (16 * 128) + (((2 * group + half) ^ (row & 7)) << 4));
    }
  }
}

/// One of the kConverters warps: all tiles, in the order in which load_tiles brings them.
template <class C>
__device__ __forceinline__ void convert_tiles(SharedPlan<C>& shared, int converter) {
  RingPosition<kTileSlots> slot;
  RingPosition<C::kRawStages> raw;
  RingPosition<C::kValueStages> v;
  const bool first_lane = threadIdx.x % 32 == 0;
  for (;;) {
    shared.tile_full[slot.stage].wait(slot.phase);
    const Tile& tile = shared.tile[slot.stage];
    const bool valid = tile.valid;
    const int begin = tile.block_begin, end = tile.block_end;
    const int used = prefill_sm90::used_in_last(tile, C::kTileN);
    __syncwarp();
    if (first_lane) shared.tile_empty[slot.stage].arrive();
    if (!valid) return;
#pragma unroll 1
    for (int block = end - 1; block >= begin; --block) {
      shared.raw_full[raw.stage].wait(raw.phase);
      shared.value_empty[v.stage].wait(v.phase ^ 1);
      transpose_values<C>(shared.raw[raw.stage], shared.value[v.stage], converter, block == end - 1 ? used : C::kTileN);
      fence_async_proxy();
      __syncwarp();
      if (first_lane) {
        shared.raw_empty[raw.stage].arrive();
        shared.value_full[v.stage].arrive();
      }
      raw.advance();
      v.advance();
    }
    slot.advance();
  }
}

}  // namespace fa::prefill_sm90_f8
