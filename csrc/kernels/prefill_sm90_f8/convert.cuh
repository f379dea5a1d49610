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

/// 64 keys x 16 columns of a warp: what ldmatrix, transposing pairs of columns, gives a lane of eight groups of eight keys: keys
/// 2 t and 2 t + 1 (t = lane % 4), columns 2 c and 2 c + 1 (c = lane / 4).
struct ValueBlock {
  uint32_t keys[2][4];

  /// From rows 0 … 63 of keys: `address` is of the lane's row.
  __device__ __forceinline__ void load(uint32_t address) {
    ldmatrix_x4_transposed(keys[0], address);
    ldmatrix_x4_transposed(keys[1], address + 32 * 128);
  }

  /// To 16 rows of transposed values, 64 bytes each, of which the lane names `first` of the first 32 and `second` of the others.
  /// A matrix of stmatrix has rows 0, 2, 4, 6, 9, 11, 13, 15 or the others: eight different rows under the swizzle, so that there
  /// is no bank conflict.
  __device__ __forceinline__ void store(uint32_t first, uint32_t second, uint32_t even, uint32_t odd) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      prefill_sm90::store_matrices(i == 0 ? first : second, __byte_perm(keys[i][0], keys[i][1], even),
                                   __byte_perm(keys[i][2], keys[i][3], even), __byte_perm(keys[i][0], keys[i][1], odd),
                                   __byte_perm(keys[i][2], keys[i][3], odd));
    }
  }
};

/// What a lane of a warp that transposes has to know, in registers, of which producers have few.
struct Transposer {
  uint32_t from;       // in a tile of values as it came: the lane's row of the first block
  uint32_t to;         // in a tile of transposed values: likewise
  uint32_t even, odd;  // which bytes of two registers make the matrices of stmatrix

  /// `first`: the warp's first block of 16 columns. Reading, the lane names row lane % 8 of matrix lane / 8, which has keys
  /// 8 (lane / 8) …; writing, row lane % 8 of its matrix.
  __device__ __forceinline__ explicit Transposer(int first) {
    const int lane = threadIdx.x % 32, i = lane % 8;
    const int row = (i < 4) == (lane < 16) ? 2 * i : 2 * i + 1, half = lane / 8 % 2;
    from = lane * 128 + ((first ^ i) << 4);
    to = (first * 16 + row) * 128 + ((half ^ (row & 7)) << 4);
    even = lane < 16 ? 0x6420 : 0x7531;
    odd = lane < 16 ? 0x7531 : 0x6420;
  }

  /// Every kStep-th block of 16 columns of a tile. While a block is on its way from shared memory, the one before it goes back
  /// there.
  template <class C, int kStep>
  __device__ __forceinline__ void transpose(const uint8_t* raw, uint8_t* value) const {
    constexpr int kBlocks = C::kHeadDim / 16;
    static_assert(C::kTileN == 128 && 8 % kStep == 0, "A warp's blocks are at the same places in each panel of 128 columns.");
    const uint32_t source = shared_address(raw) + from, target = shared_address(value) + to;
    ValueBlock lower, upper;  // keys 0 … 63 and 64 … 127
    lower.load(source);
#pragma unroll
    for (int block = 0; block < kBlocks; block += kStep) {
      const auto address = [&](int i) { return (source ^ (i % 8 << 4)) + i / 8 * (C::kTileN * 128); };
      const uint32_t rows = block * (16 * 128);
      upper.load(address(block) + 64 * 128);
      lower.store(target + rows, (target ^ 32) + rows, even, odd);
      if (block + kStep < kBlocks) lower.load(address(block + kStep));
      upper.store((target ^ 64) + rows, (target ^ 96) + rows, even, odd);
    }
  }
};

/// The eight rows behind the transposed values: the first is of ones (0x38 in e4m3), the others of zeros. For a warp; that
/// another does the same is no harm.
template <class C>
__device__ __forceinline__ void write_ones(uint8_t* rows) {
  for (int i = threadIdx.x % 32; i < C::kOnesRows * 8; i += 32) {
    const uint32_t word = i < 8 ? 0x38383838 : 0;
    *reinterpret_cast<uint4*>(rows + i * 16) = make_uint4(word, word, word, word);
  }
}

/// One of the kConverters warps: all tiles, in the order in which load_tiles brings them.
template <class C>
__device__ __forceinline__ void convert_tiles(SharedPlan<C>& shared, int converter) {
  RingPosition<kTileSlots> slot;
  RingPosition<C::kRawStages> raw;
  RingPosition<C::kValueStages> v;
  const bool first_lane = threadIdx.x % 32 == 0;
  const Transposer transposer(converter);
  if constexpr (C::kOnesRows > 0) {
    for (auto& value : shared.value) write_ones<C>(value + C::kHeadDim * 128);
  }
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
      if (block == end - 1 && used < C::kTileN) {  // both warps do it, each for what it reads itself
        prefill_sm90::clear_rows<C>(shared.raw[raw.stage], used, threadIdx.x % 32, 32);
        __syncwarp();
      }
      transposer.transpose<C, C::kConverters>(shared.raw[raw.stage], shared.value[v.stage]);
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
