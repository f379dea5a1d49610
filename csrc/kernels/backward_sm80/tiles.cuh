// SPDX-License-Identifier: Apache-2.0
// Tiles of the backward kernels for mma.sync on their way between global and shared memory.
#pragma once

#include "kernels/backward_sm80/tile_work.cuh"
#include "kernels/common/convert.cuh"
#include "kernels/common/reduce.cuh"
#include "kernels/common/shared_memory.cuh"
#include "kernels/common/tf32.cuh"
#include "kernels/prefill_sm80/load_tile.cuh"

namespace fa::backward_sm80 {

template <class T>
__device__ __forceinline__ T* row_at(const TensorView& view, int64_t b, int64_t h, int64_t row) {
  return static_cast<T*>(view.data) + b * view.stride[0] + h * view.stride[1] + row * view.stride[2];
}

/// Where the thread copies rows of `view` from, `row` being the first: its first chunk of them.
template <class Copy, class T>
__device__ __forceinline__ const T* source_of_rows(const TensorView& view, int64_t b, int64_t h, int64_t row) {
  return row_at<T>(view, b, h, row + Copy::row()) + Copy::column();
}

/// Rows of `view` into a tile, by the whole thread block: valid_rows of them, 0 behind. Asynchronous where `by_16`.
template <class T, class Layout, int kRows, int kThreads>
__device__ __forceinline__ void load_rows(unsigned char* tile, const TensorView& view, const T* source, int valid_rows,
                                          bool by_16) {
  using Copy = prefill_sm80::TileCopy<T, Layout, kRows, kThreads>;
  const int columns = static_cast<int>(view.shape[3]);
  if (!by_16) {
    const T* first = source - Copy::row() * view.stride[2] - Copy::column();
    prefill_sm80::load_strided_by_element<T, Layout, kRows, kThreads>(tile, valid_rows, columns, first, view.stride[2]);
    return;
  }
  const uint32_t place = static_cast<uint32_t>(__cvta_generic_to_shared(tile)) + Copy::place();
#pragma unroll
  for (int pass = 0; pass < Copy::kPasses; ++pass, source += Copy::kRowsPerPass * view.stride[2])
    Copy::copy(place, source, pass, valid_rows, columns);
}

/// kCount floats, for which the array has room.
template <int kCount>
__device__ __forceinline__ void load_floats(uint32_t shared, const float* data) {
  if (threadIdx.x < kCount / 4) cp_async_16(shared + 16 * threadIdx.x, data + 4 * threadIdx.x, true);
}

/// The elements of a tile that the thread has copied become the nearest TF32 numbers.
template <class Copy>
__device__ __forceinline__ void round_copied(uint32_t tile) {
  Copy::for_chunks(tile + Copy::place(), [](uint32_t place) {
    float4 x = load_shared4(place);
    const auto rounded = [](float number) { return __uint_as_float(round_tf32_away(__float_as_uint(number))); };
    store_shared(place, make_float4(rounded(x.x), rounded(x.y), rounded(x.z), rounded(x.w)));
  });
}

/// Where a tile of `bytes` bytes has infinity or NaN, they become 0, by the whole block.
template <class T, int kThreads>
__device__ __forceinline__ void clean_tile(unsigned char* tile, int bytes) {
  constexpr uint32_t kExponent = __is_same(T, float) ? 0x7f800000u : __is_same(T, __half) ? 0x7c00u : 0x7f80u;
#pragma unroll 4
  for (int i = threadIdx.x; i < bytes / 16; i += kThreads) {
    uint4& chunk = reinterpret_cast<uint4*>(tile)[i];
    const uint4 given = chunk;
    uint32_t words[4] = {given.x, given.y, given.z, given.w}, found = 0;
#pragma unroll
    for (uint32_t& word : words) {
      uint32_t keep = 0xffffffffu;
      if constexpr (sizeof(T) == 4) {
        if ((word & kExponent) == kExponent) keep = 0;
      } else {
        if ((word & kExponent) == kExponent) keep = 0xffff0000u;
        if ((word >> 16 & kExponent) == kExponent) keep &= 0x0000ffffu;
      }
      found |= ~keep;
      word &= keep;
    }
    if (found != 0) chunk = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

/// 0 into row `row` of a tile, by a warp.
template <class Layout, int kRows>
__device__ __forceinline__ void clear_tile_row(unsigned char* tile, int row) {
  for (int i = threadIdx.x % 32; i < Layout::kBytes / kRows / 16; i += 32)
    *reinterpret_cast<uint4*>(tile + Layout::offset(row, i)) = make_uint4(0, 0, 0, 0);
}

/// The lane's pairs of a row of an accumulator, times a factor, from `first_column` of the row on. `half`: 0 for the rows g of
/// its blocks, 1 for g + 8.
template <class T, int kColumnBlocks>
__device__ __forceinline__ void write_pairs(T* row, int first_column, int columns, bool by_16,
                                            const float (&sums)[kColumnBlocks][4], int half, float factor) {
  const int first = first_column + threadIdx.x % 4 * 2;
#pragma unroll
  for (int c = 0; c < kColumnBlocks; ++c) {
    const int column = first + 8 * c;
    const float x = sums[c][2 * half] * factor, y = sums[c][2 * half + 1] * factor;
    if (by_16) {
      if (column < columns) store_pair(row + column, x, y);
    } else {
      if (column < columns) row[column] = from_float<T>(x);
      if (column + 1 < columns) row[column + 1] = from_float<T>(y);
    }
  }
}

/// A warp's float32 sums of its keys, times a factor, to rows of `view`: four lanes write 32 bytes. Keys that aren't in use
/// become 0.
template <class Config>
__device__ __forceinline__ void write_float_keys(const typename Config::Products::Sums& sums, float factor,
                                                 const TensorView& view, const TileWork& work, int first_key, bool by_16) {
  constexpr int kColumnBlocks = Config::Products::kColumnBlocks;
#pragma unroll
  for (int i = 0; i < 2 * Config::kKeyBlocks; ++i) {
    const int row = first_key + Config::first_key() + 8 * i + threadIdx.x % 32 / 4;
    if (row >= work.sequence.num_keys) continue;
    float used[kColumnBlocks][4];
#pragma unroll
    for (int c = 0; c < kColumnBlocks * 4; ++c) used[c / 4][c % 4] = row < work.num_keys ? sums[i / 2][c / 4][c % 4] : 0.0f;
    write_pairs(row_at<float>(view, work.sequence.batch_idx, work.kv_head, work.sequence.first_key + row),
                Config::column_group() * Config::kColumns, static_cast<int>(view.shape[3]), by_16, used, i % 2, factor);
  }
}

/// The same for 16-bit elements; through the warp's part of `tile`, so that they are written in whole 16-byte chunks.
template <class Config>
__device__ __forceinline__ void write_short_keys(const typename Config::Products::Sums& sums, float factor, unsigned char* tile,
                                                 const TensorView& view, const TileWork& work, int first_key, bool by_16) {
  using T = typename Config::T;
  using Layout = typename Config::LayoutK;
  const int lane = threadIdx.x % 32, own = Config::first_key();
  const uint32_t place = static_cast<uint32_t>(__cvta_generic_to_shared(tile)) +
                         Layout::offset(own + lane / 4, Config::column_group() * (Config::kColumns / 8)) + 4 * (lane % 4);
#pragma unroll
  for (int m = 0; m < Config::kKeyBlocks; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool in_use = first_key + own + 16 * m + 8 * r + lane / 4 < work.num_keys;
#pragma unroll
      for (int d = 0; d < Config::kColumns / 8; ++d) {
        const uint32_t pair = pack2<T>(sums[m][d][2 * r] * factor, sums[m][d][2 * r + 1] * factor);
        store_shared(Layout::advance(place, 16 * m + 8 * r, d), in_use ? pair : 0u);
      }
    }
  }
  __syncwarp();
  constexpr int kPerBlock = Layout::kChunksPerBlock, kRowsPerPass = 32 / kPerBlock;
  const int columns = static_cast<int>(view.shape[3]), num_rows = static_cast<int>(work.sequence.num_keys) - first_key;
#pragma unroll 1
  for (int row = own + lane / kPerBlock; row < min(own + 16 * Config::kKeyBlocks, num_rows); row += kRowsPerPass) {
    T* data = row_at<T>(view, work.sequence.batch_idx, work.kv_head, work.sequence.first_key + first_key + row);
#pragma unroll
    for (int block = 0; block < Config::kColumns / (8 * kPerBlock); ++block) {
      const int chunk = Config::column_group() * (Config::kColumns / 8) + block * kPerBlock + lane % kPerBlock;
      const unsigned char* source = tile + Layout::offset(row, chunk);
      if (by_16) {
        if (8 * chunk < columns) *reinterpret_cast<uint4*>(data + 8 * chunk) = *reinterpret_cast<const uint4*>(source);
      } else {
        for (int i = 8 * chunk; i < min(8 * chunk + 8, columns); ++i) data[i] = reinterpret_cast<const T*>(source)[i - 8 * chunk];
      }
    }
  }
}

template <class Config>
__device__ __forceinline__ void write_keys(const typename Config::Products::Sums& sums, float factor, unsigned char* tile,
                                           const TensorView& view, const TileWork& work, int first_key, bool by_16) {
  if constexpr (Config::kElementBytes == 4) {
    write_float_keys<Config>(sums, factor, view, work, first_key, by_16);
  } else {
    write_short_keys<Config>(sums, factor, tile, view, work, first_key, by_16);
  }
}

}  // namespace fa::backward_sm80
