// SPDX-License-Identifier: Apache-2.0
// Query, key and value tiles on their way into shared memory. Keys and values take turns in a ring of slots: half-step 2n is the
// keys of the n-th tile, 2n + 1 its values; kSlots - 1 half-steps are under way while one is worked on.
#pragma once

#include "kernels/common/query_bias.cuh"
#include "kernels/prefill_sm80/epilogue.cuh"
#include "kernels/prefill_sm80/load_tile.cuh"

namespace fa::prefill_sm80 {

template <class Config>
struct KeyValueStream {
  using T = typename Config::T;
  using Layout = typename Config::LayoutKv;
  using Copy = TileCopy<T, Layout, Config::kTileKv, Config::kThreads>;
  static constexpr int kSlots = Config::kSlots, kLastSlot = (kSlots - 1) * Layout::kBytes;
  const AttentionParams& p;
  const TileGrid& grid;
  unsigned char* slots;
  int end;       // of the key tiles
  const T* key;  // row 0, or where copies are asynchronous this thread's first chunk
  const T* value;
  int kv_length;
  uint32_t place;  // this thread's in slot 0
  int slot = 0;    // of the current half-step, in bytes

  __device__ __forceinline__ KeyValueStream(const AttentionParams& p, const TileGrid& grid, unsigned char* slots)
      : p(p), grid(grid), slots(slots), place(static_cast<uint32_t>(__cvta_generic_to_shared(slots)) + Copy::place()) {}

  __device__ __forceinline__ void start(const Sequence& s, int head, int begin_tile, int end_tile) {
    end = end_tile;
    kv_length = static_cast<int>(s.mask.kv_length);
    key = row_data<T>(p.key, s.batch_idx, head, s.first_key + (grid.key_by_16 ? Copy::row() : 0)) +
          (grid.key_by_16 ? Copy::column() : 0);
    value = row_data<T>(p.value, s.batch_idx, head, s.first_key + (grid.value_by_16 ? Copy::row() : 0)) +
            (grid.value_by_16 ? Copy::column() : 0);
#pragma unroll
    for (int half = 0; half < kSlots - 1; ++half) {
      half % 2 == 0 ? issue<false>(begin_tile + half / 2, half * Layout::kBytes)
                    : issue<true>(begin_tile + half / 2, half * Layout::kBytes);
    }
  }

  /// Starts the copy of a tile's keys or values into a slot, and in any case a new group of copies.
  template <bool kValue>
  __device__ __forceinline__ void issue(int tile, int target) {
    if (tile < end) {
      const TensorView& view = kValue ? p.value : p.key;
      const int first_key = tile * Config::kTileKv, valid_rows = kv_length - first_key,
                head_dim = static_cast<int>(view.shape[3]);
      const T* data = (kValue ? value : key) + first_key * view.stride[2];
      if (kValue ? grid.value_by_16 : grid.key_by_16) {
#pragma unroll
        for (int pass = 0; pass < Copy::kPasses; ++pass, data += Copy::kRowsPerPass * view.stride[2]) {
          Copy::copy(place + target, data, pass, valid_rows, head_dim);
        }
      } else {
        load_strided_by_element<T, Layout, Config::kTileKv, Config::kThreads>(slots + target, valid_rows, head_dim, data,
                                                                              view.stride[2]);
      }
    }
    cp_async_commit();
  }

  /// Waits for the keys or values of `tile`, refills the slot that all warps have just left, and returns what has come as a
  /// shared-memory address. To be called for keys and values in turn.
  template <bool kValue>
  __device__ __forceinline__ uint32_t advance(int tile) {
    cp_async_wait<kSlots - 2>();
    __syncthreads();
    constexpr int kHalf = kValue + kSlots - 1;  // counted from the keys of `tile`
    issue<kHalf % 2 == 1>(tile + kHalf / 2, slot == 0 ? kLastSlot : slot - Layout::kBytes);
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(slots)) + slot;
    slot = slot == kLastSlot ? 0 : slot + Layout::kBytes;
    return address;
  }
};

template <class Config>
__device__ __forceinline__ void load_query_tile(unsigned char* shared, const AttentionParams& p, const TileGrid& grid,
                                                const TileWork& work) {
  using T = typename Config::T;
  using Copy = TileCopy<T, typename Config::LayoutQ, Config::kTileQ, Config::kThreads>;
  const int head_dim = static_cast<int>(p.query.shape[3]);
  const int64_t rows = work.sequence.query_length * (Config::kSplit ? grid.group_size.divisor : 1) - work.first_row;
  const int valid_rows = static_cast<int>(SequenceRule::clamp(rows, 0, Config::kTileQ));
  const auto row = [&](int i) -> const T* {
    const TileRow r = tile_row<Config::kSplit>(work, grid, i);
    return row_data<T>(p.query, work.sequence.batch_idx, r.head, work.sequence.first_row + r.row);
  };
  if (grid.query_by_16) {
    const uint32_t place = static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + Copy::place();
    const T* data = row(Copy::row()) + Copy::column();
#pragma unroll
    for (int pass = 0; pass < Copy::kPasses; ++pass) {
      if (Config::kSplit && pass > 0) data = row(Copy::row() + pass * Copy::kRowsPerPass) + Copy::column();
      Copy::copy(place, data, pass, valid_rows, head_dim);
      if (!Config::kSplit) data += Copy::kRowsPerPass * p.query.stride[2];
    }
  } else if constexpr (Config::kSplit) {
    load_tile_by_element<T, typename Config::LayoutQ, Config::kTileQ, Config::kThreads>(shared, valid_rows, head_dim, row);
  } else {
    load_strided_by_element<T, typename Config::LayoutQ, Config::kTileQ, Config::kThreads>(shared, valid_rows, head_dim, row(0),
                                                                                           p.query.stride[2]);
  }
}

/// Adds query_bias to the tile that load_query_tile has begun to bring. Out of line, for the main loop's registers.
template <class Config>
__device__ __noinline__ void add_query_bias(unsigned char* shared, const AttentionParams& p, const TileGrid& grid,
                                            const TileWork& work) {
  using T = typename Config::T;
  constexpr int kPerChunk = 16 / sizeof(T), kChunks = Config::kHeadDim / kPerChunk;
  const uint32_t first = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  cp_async_wait<Config::kSlots - 2>();
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < Config::kTileQ * kChunks; i += Config::kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const TileRow r = tile_row<Config::kSplit>(work, grid, row);
    if (!r.exists) continue;
    const BiasChunk<T> bias(query_bias_of<T>(p, r.head), chunk * kPerChunk, static_cast<int>(p.query.shape[3]));
    bias.add_to(first + Config::LayoutQ::offset(row, chunk));
  }
  __syncthreads();
}

}  // namespace fa::prefill_sm80
