// SPDX-License-Identifier: Apache-2.0
// The warps of prefill_sm90_f32 that make TF32 operands of the keys and values that the copy engine has brought: rounded to
// nearest, or split in two; values transposed, and those behind the last key in use cleared.
#pragma once

#include "kernels/common/transpose.cuh"
#include "kernels/common/wgmma_tf32.cuh"
#include "kernels/prefill_sm90_f32/shared_plan.cuh"

namespace fa::prefill_sm90_f32 {

/// Writes 16 bytes as an operand; kSplit: and what rounding left, `to_low` bytes behind it.
template <bool kSplit>
__device__ __forceinline__ void store_operand(uint32_t address, uint32_t to_low, float4 x) {
  const float4 rounded = make_float4(round_tf32(x.x), round_tf32(x.y), round_tf32(x.z), round_tf32(x.w));
  store_shared(address, rounded);
  if constexpr (kSplit) {
    store_shared(address + to_low, make_float4(x.x - rounded.x, x.y - rounded.y, x.z - rounded.z, x.w - rounded.w));
  }
}

/// This warp's share of a tile of keys, in place.
template <class C>
__device__ __forceinline__ void convert_keys(const uint8_t* keys, int converter) {
  constexpr int kBlocksPerPanel = C::kTileN / 32;
#pragma unroll 1
  for (int block = converter; block < C::kPanels * kBlocksPerPanel; block += C::kConverters) {
    const int place = block / kBlocksPerPanel * C::kParts * kBlocksPerPanel + block % kBlocksPerPanel;
    const uint32_t first = shared_address(keys) + place * C::kBlockBytes + threadIdx.x % 32 * 16;
    float4 x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = load_shared4(first + i * 512);
#pragma unroll
    for (int i = 0; i < 8; ++i) store_operand<C::kSplit>(first + i * 512, C::kTileN * 128, x[i]);
  }
}

/// This warp's share of a tile of values, in place, of whose keys the first `used` are in use.
template <class C>
__device__ __forceinline__ void convert_values(const uint8_t* values, int converter, int used) {
#pragma unroll 1
  for (int block = converter; block < C::kPanels * (C::kTileN / 32); block += C::kConverters) {
    const uint32_t address = shared_address(values) + block * C::kBlockBytes;
    const int used_in_block = used - block / C::kPanels * 32;
    Block32 x;
    x.load(address);
    if (used_in_block < 32) x.clear_from(used_in_block);
    __syncwarp();  // all have read before any writes
    x.transposed(address, [](uint32_t to, float4 column) { store_operand<C::kSplit>(to, C::kTileBytes, column); });
  }
}

/// What a converted buffer owes to those who read it.
template <int kArrivals>
__device__ __forceinline__ void announce(Mbarrier<kArrivals>& full) {
  fence_async_proxy();
  __syncwarp();
  if (threadIdx.x % 32 == 0) full.arrive();
}

/// One of the kConverters warps: all tiles, in the order in which load_tiles brings them.
template <class C>
__device__ __forceinline__ void convert_tiles(SharedPlan<C>& shared, int converter) {
  RingPosition<kTileSlots> slot;
  RingPosition<C::kKeyStages> k;
  RingPosition<C::kValueStages> v;
  for (;;) {
    shared.tile_full[slot.stage].wait(slot.phase);
    const Tile& tile = shared.tile[slot.stage];
    const bool valid = tile.valid;
    const int begin = tile.block_begin, end = tile.block_end;
    const int used = prefill_sm90::used_in_last(tile, C::kTileN);
    __syncwarp();
    if (threadIdx.x % 32 == 0) shared.tile_empty[slot.stage].arrive();
    if (!valid) return;
#pragma unroll 1
    for (int block = end - 1; block >= begin; --block) {
      shared.key_raw[k.stage].wait(k.phase);
      convert_keys<C>(shared.key[k.stage], converter);
      announce(shared.key_full[k.stage]);
      k.advance();
      shared.value_raw[v.stage].wait(v.phase);
      convert_values<C>(shared.value[v.stage], converter, block == end - 1 ? used : C::kTileN);
      announce(shared.value_full[v.stage]);
      v.advance();
    }
    slot.advance();
  }
}

}  // namespace fa::prefill_sm90_f32
