// SPDX-License-Identifier: Apache-2.0
// How heads that all have equally many key tiles are cut into pieces, at the same places of each head and one piece a block. That
// ends sooner than equal ranges of all heads, where blocks have the end of one head and the beginning of another. If the blocks
// of a head are a cluster, they need no device memory to merge their results. Many short heads are drawn by the blocks, since not
// all multiprocessors read equally fast. Used by launch.cuh.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/decode_sm90/args.h"

namespace fa::decode_sm90 {

/// `heads` of `tiles` each, `tile_bytes` of keys and values in a tile, `part_bytes` of partial results of a part. heads 0 in the
/// result: a Schedule does better. most_clusters(blocks): how many clusters of so many blocks the device holds at a time.
template <class MostClusters>
HeadCut cut_heads(int64_t heads, int tiles, int64_t tile_bytes, int64_t part_bytes, int blocks, MostClusters most_clusters) {
  HeadCut cut{};
  if (heads == 0 || int64_t{tiles} * blocks >= INT32_MAX) return cut;
  int parts = 1;
  if (heads > blocks) {
    if (heads < int64_t{kMinHeadsToDraw} * blocks || tiles < kMinTilesToDraw) return cut;
  } else {
    const int most = static_cast<int>(blocks / heads);
    const int64_t least = std::max<int64_t>(kMinUnitsPerBlock, kMinReadOfPart * part_bytes / tile_bytes);
    const int64_t few = std::min(kMostClusterBlocks, tiles / kMinUnitsPerBlock);  // whose merge costs little in a cluster
    parts = static_cast<int>(std::max<int64_t>(std::min<int64_t>(most, std::max(tiles / least, few)), 1));
    int cluster = kMostClusterBlocks;
    while (cluster > parts) cluster /= 2;
    const bool nearly_all = 10 * cluster >= 9 * parts || tiles * tile_bytes <= int64_t{kMostClusterBytes} * cluster;
    if (cluster > 1 && nearly_all && heads <= most_clusters(cluster)) {
      cut.cluster = parts = cluster;
    } else if (parts == most && 10 * most * heads < 9 * blocks) {
      return cut;  // too many blocks would have nothing to do
    }
  }
  cut.heads = static_cast<int>(heads);
  cut.tiles = tiles;
  cut.parts = Divisor(parts);
  cut.pieces = static_cast<int>(heads * parts);
  return cut;
}

}  // namespace fa::decode_sm90
