// SPDX-License-Identifier: Apache-2.0
// The tile table of decode_sm90 and what else was chosen by reckoning or measurement: one place for all of it. Read by the kernel
// and by the host, which lays out grid and shared memory.
#pragma once

#include <cstdint>

namespace fa::decode_sm90 {

inline constexpr int kMostWarps = 8;             // that multiply, of a block
inline constexpr int kRowsPerWarp = 16;          // of a matrix instruction: (query row, query head) pairs
inline constexpr int kMostTileRows = 64;         // of the pairs that share a read of keys and values
inline constexpr int kPanelRowBytes = 128;       // the width of the copy engine's swizzle
inline constexpr int kMergeLanes = 16;           // with four columns each, which a warp merges from all parts of a head at once
inline constexpr int kBytesTogether = 16 << 10;  // of smaller tiles, whose copies the lanes of the producer start side by side …
inline constexpr int kTilesTogether = 4;         // … and how many tiles of just this size, where that pays (Traits)
inline constexpr int kMaxStages = 24;            // of the ring of key and value tiles
inline constexpr int kTilesBeforeItem = 1;       // whose copies start before the consumers are told what for; at most a ring
inline constexpr int kItemSlots = 4;             // pieces of work that the producer may be ahead
inline constexpr int kSharedLimit = 227 * 1024;  // bytes of shared memory of a block
inline constexpr int kMaxScannedMasks = 256;     // batch entries whose masks every block may look through

// If every block has so much to read that the memory is busy all along, it is faster with less under way.
inline constexpr int kMinBytesOfLongShare = 640 << 10;  // of a block's keys and values
inline constexpr int kBytesAtOnce = 64 << 10;           // under way to a block …
inline constexpr int kBytesAtOnceOfPages = 80 << 10;    // … where keys and values lie in pages …
inline constexpr int kBytesAtOnceOfDrawn = 96 << 10;    // … and where blocks draw whole heads

inline constexpr int kBytesAhead = 64 << 10;  // of a block's keys and values, to L2 before it is known that they are wanted

// Where the keys are cut. Units are key tiles.
inline constexpr int kMinReadOfPart =
    16;  // times the bytes of its partial results, so that the merge costs less than its keys; …
inline constexpr int kEnoughUnitsOfPart = 4;  // … but so many, one for each of four warps, always do: blocks share a large merge
inline constexpr int kMinUnitsPerBlock = 2;   // with less, a block's own start and end would cost more than its keys
inline constexpr int kMaxSnap = 2;            // a cut so near to the end of a head is moved there, …
inline constexpr int kUnitsPerSnap = 4;       // … but not by more than this part of a block's share

// Where all heads have equally many key tiles (head_cut.h).
inline constexpr int kMostClusterBlocks = 8;          // that merge a head through each other's shared memory
inline constexpr int kMostClusterBytes = 128 * 1024;  // of a block's keys and values, where more blocks could share the head
inline constexpr int kMinHeadsToDraw = 2;             // a block: with fewer, ranges of equal length end sooner
inline constexpr int kMinTilesToDraw = 16;            // of a head: with less, drawing would take longer than reading

inline constexpr int64_t kSharedMerge = 96 << 10;  // partial results from this many bytes on are merged by all of their blocks
inline constexpr int kPatience = 16000;            // clocks that a block waits for others before it leaves the merge to them
inline constexpr int kPatienceOfLast = 4000;       // clocks that the last block gives others to begin with their pieces of it

struct TileShape {
  int warps;              // that multiply; one more starts the copies
  int tile_n;             // keys of a stage, which one warp works off for its rows; a multiple of 32
  int blocks_per_sm = 1;  // one ring as deep as shared memory allows, instead of several

  /// Of a block; the system keeps 1 KB for each.
  constexpr int shared_bytes() const { return (kSharedLimit + 1024) / blocks_per_sm - 1024; }
};

/// head_dim: the bucket, a multiple of 64. Four warps have 255 registers each, enough to read several operands ahead; eight
/// multiply no faster, since each waits for shared memory, and have twice as much to merge. With 64 columns, where the softmax is
/// as much work as the products, eight are faster.
constexpr TileShape tile_shape(int head_dim) {
  if (head_dim <= 64) return {8, 32};
  return {4, 32};
}

/// How many stages the ring has at most. Tiles of a quantized cache are small, and while the end of a head is merged, the memory
/// reads no more than fits the ring. For other caches more stages save no time, and a smaller ring leaves room for a block of the
/// next kernel.
constexpr int most_stages(bool is_quantized) { return is_quantized ? kMaxStages : 16; }

/// Of a row of keys or values.
constexpr int num_panels(int row_bytes) { return (row_bytes + kPanelRowBytes - 1) / kPanelRowBytes; }

/// float32 output of one warp in the merge of a block's warps; rows are padded so that neighbours use different banks.
constexpr int merge_stride(int head_dim) { return head_dim + 8; }
constexpr int merge_bytes(int head_dim, int rows) { return 4 * rows * merge_stride(head_dim) * tile_shape(head_dim).warps; }

}  // namespace fa::decode_sm90
