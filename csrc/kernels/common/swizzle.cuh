// SPDX-License-Identifier: Apache-2.0
// How a tile lies in shared memory: blocks of 64 or 128 bytes of each row, one block behind the other, and in a row the 16-byte
// chunks permuted so that neither cp.async nor ldmatrix meets a bank conflict. Called by the sm_80 kernels.
#pragma once

#include <cstdint>

namespace fa {

/// Which eight rows one ldmatrix reads: neighbours, or rows 8t + e of a group of 32 (t < 4, e < 2; see key_in_tile).
enum class RowOrder { kNeighbours, kInterleaved };

/// Key of accumulator column 2t + e of the n-block `block`. Scores are computed for permuted keys, so that lane t owns eight
/// neighbouring keys in four n-blocks and reads their bias or mask in one access. K and V are permuted alike, so that the result
/// is the same.
__device__ __forceinline__ constexpr int key_in_tile(int block, int t, int e) {
  return 32 * (block / 4) + 8 * t + 2 * (block % 4) + e;
}

template <int kRows, int kRowBytes, RowOrder kOrder>
struct TileLayout {
  static constexpr int kBlockBytes = kRowBytes % 128 == 0 ? 128 : 64;
  static constexpr int kChunksPerBlock = kBlockBytes / 16;
  static constexpr int kBytes = kRows * kRowBytes;
  static_assert(kRowBytes % kBlockBytes == 0);

  /// What the chunk index of a row is XORed with. Linear over XOR of rows.
  static __device__ __forceinline__ constexpr int permutation(int row) {
    if (kOrder == RowOrder::kNeighbours) return kBlockBytes == 128 ? row & 7 : (row >> 1) & 3;
    return kBlockBytes == 128 ? (row & 1) | ((row >> 2) & 6) : (row >> 3) & 3;
  }

  /// Byte offset of 16-byte chunk `chunk` of row `row`.
  static __device__ __forceinline__ constexpr uint32_t offset(int row, int chunk) {
    const int block = chunk / kChunksPerBlock, in_block = chunk % kChunksPerBlock;
    return block * (kRows * kBlockBytes) + row * kBlockBytes + ((in_block ^ permutation(row)) << 4);
  }

  /// offset(row + rows, chunk + chunks) from `lane` = 128-byte aligned base + offset(row, chunk), for constants that share no bit
  /// with row and chunk. One XOR, which calls with equal permutations share; the rest is an immediate.
  static __device__ __forceinline__ uint32_t advance(uint32_t lane, int rows, int chunks) {
    return (lane ^ (((chunks % kChunksPerBlock) ^ permutation(rows)) << 4)) + (chunks / kChunksPerBlock) * (kRows * kBlockBytes) +
           rows * kBlockBytes;
  }
};

}  // namespace fa
