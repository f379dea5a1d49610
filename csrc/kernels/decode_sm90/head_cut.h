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

/// Key tiles that a part of a head has at least.
inline int least_tiles_of_part(int64_t tile_bytes, int64_t part_bytes) {
  const int64_t worth_while = std::max<int64_t>(kMinUnitsPerBlock, kMinReadOfPart * part_bytes / tile_bytes);
  return static_cast<int>(std::min<int64_t>(worth_while, kEnoughUnitsOfPart));
}

/// How many blocks share a head as a cluster, at most `parts`; 0 where it is not shared so. A head has at most `tiles` tiles.
/// most_clusters(blocks): how many clusters of so many blocks the device holds at a time.
template <class MostClusters>
int cluster_of_head(int64_t heads, int64_t parts, int64_t tiles, int tile_bytes, MostClusters most_clusters) {
  int cluster = kMostClusterBlocks;
  while (cluster > parts) cluster /= 2;
  const bool nearly_all = 10 * cluster >= 9 * parts || tiles * tile_bytes <= int64_t{kMostClusterBytes} * cluster;
  return cluster > 1 && nearly_all && heads <= most_clusters(cluster) ? cluster : 0;
}

/// `heads` of `tiles` each, `tile_bytes` of keys and values in a tile, at least `least_tiles` for a part. heads 0 in the result:
/// a Schedule does better.
template <class MostClusters>
HeadCut cut_heads(int64_t heads, int tiles, int tile_bytes, int least_tiles, int blocks, MostClusters most_clusters) {
  HeadCut cut{};
  if (heads == 0 || int64_t{tiles} * blocks >= INT32_MAX) return cut;
  int parts = 1;
  if (heads > blocks) {
    if (heads < int64_t{kMinHeadsToDraw} * blocks || tiles < kMinTilesToDraw) return cut;
  } else {
    const int most = blocks / static_cast<int>(heads);
    const int few = std::min(kMostClusterBlocks, tiles / kMinUnitsPerBlock);  // whose merge costs little in a cluster
    parts = std::max(std::min(most, std::max(tiles / least_tiles, few)), 1);
    cut.cluster = cluster_of_head(heads, parts, tiles, tile_bytes, most_clusters);
    if (cut.cluster > 0) {
      parts = cut.cluster;
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

/// The same where only the device learns how many tiles the heads have: the cut, but for its tiles, of heads that all have at
/// least cut.least_tiles of them, and at most `most_tiles`.
template <class MostClusters>
HeadCut cut_unknown_heads(int64_t heads, int64_t most_tiles, int tile_bytes, int least_tiles, int blocks,
                          MostClusters most_clusters) {
  HeadCut cut{};
  if (heads == 0 || most_tiles * blocks >= INT32_MAX) return cut;
  const bool are_drawn = heads > blocks;
  int64_t parts = are_drawn ? 1 : blocks / heads;
  const int64_t few = std::min(parts, most_tiles / kMinUnitsPerBlock);
  if (const int cluster = cluster_of_head(heads, few, most_tiles, tile_bytes, most_clusters); cluster > 0) {
    cut.cluster = cluster;
    parts = cluster;
    least_tiles = kMinUnitsPerBlock;
  } else if (are_drawn ? heads < int64_t{kMinHeadsToDraw} * blocks : 10 * parts * heads < 9 * blocks) {
    return cut;
  }
  cut.heads = static_cast<int>(heads);
  cut.tiles = static_cast<int>(most_tiles);
  cut.parts = Divisor(parts);
  cut.pieces = static_cast<int>(heads * parts);
  cut.least_tiles = are_drawn ? kMinTilesToDraw : static_cast<int>(parts) * least_tiles;
  return cut;
}

}  // namespace fa::decode_sm90
