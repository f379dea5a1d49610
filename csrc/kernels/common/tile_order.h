// SPDX-License-Identifier: Apache-2.0
// The order in which tiles of query rows are worked off: by groups of (sequence, head) pairs whose keys and values fit L2
// together, in a group by row tile, so that causal masks give the longest first. Made on the host, read by the prefill kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "fa/attention.h"
#include "kernels/common/divisor.h"

namespace fa {

/// Key heads whose keys and values take up to `bytes`.
inline int64_t key_heads_in(int64_t bytes, const AttentionParams& p) {
  return bytes / std::max<int64_t>(1, p.key.shape[2] * (p.key.shape[3] + p.value.shape[3]) * size_of(p.key.dtype));
}

/// Do several batch entries add the same bias?
inline bool batch_shares_bias(const AttentionParams& p) {
  return !p.cu_seqlens_q.present && p.bias.present && p.query.shape[0] > 1 && p.bias.stride[0] == 0;
}

/// Where a tile stands.
struct TilePlace {
  int tile;            // of its pair, 0 is the last rows
  int sequence, head;  // sequence: always 0 for packed sequences, whose tiles are found by their lengths
};

struct TileOrder {
  int num_pairs = 0;        // of batch entry and head; heads alone where packed
  int num_row_tiles = 0;    // of a pair; an upper bound over all sequences where packed
  Divisor tiles_per_group;  // pairs_per_group * num_row_tiles
  Divisor pairs_per_group;
  unsigned num_groups_before_last = 0;
  Divisor pairs_in_last_group;
  Divisor inner;               // divides a pair into (batch, head), or where batch_fastest into (head, batch)
  bool batch_fastest = false;  // neighbouring pairs differ in the batch entry: they share a bias without batch axis

  TileOrder() = default;
  /// `group`: pairs that run together; `last_group`: at most so many, and at least `group`, in the last group, whose tiles of
  /// unlike length balance the end.
  TileOrder(int64_t sequences, int64_t heads, int64_t row_tiles, int64_t group, int64_t last_group, bool batch_is_fastest)
      : num_pairs(static_cast<int>(sequences * heads)),
        num_row_tiles(static_cast<int>(row_tiles)),
        inner(batch_is_fastest ? sequences : heads),
        batch_fastest(batch_is_fastest) {
    const int64_t limit = std::min<int64_t>(num_pairs, std::numeric_limits<int32_t>::max() / row_tiles);
    const int64_t together = std::clamp<int64_t>(group, 1, limit), in_last = std::clamp<int64_t>(last_group, together, limit);
    num_groups_before_last = static_cast<unsigned>((num_pairs - in_last + together - 1) / together);
    tiles_per_group = Divisor(together * row_tiles);
    pairs_per_group = Divisor(together);
    pairs_in_last_group = Divisor(num_pairs - num_groups_before_last * together);
  }

#if defined(__CUDACC__)
  __device__ __forceinline__ TilePlace at(unsigned index) const {
    const unsigned group = min(tiles_per_group.quotient(index), num_groups_before_last);
    const unsigned in_group = index - group * tiles_per_group.divisor, first_pair = group * pairs_per_group.divisor;
    const Divisor& pairs = group == num_groups_before_last ? pairs_in_last_group : pairs_per_group;
    const unsigned tile = pairs.quotient(in_group), pair = first_pair + in_group - tile * pairs.divisor;
    const unsigned outer = inner.quotient(pair), rest = pair - outer * inner.divisor;
    const int sequence = static_cast<int>(batch_fastest ? rest : outer), head = static_cast<int>(batch_fastest ? outer : rest);
    return {static_cast<int>(tile), sequence, head};
  }
#endif
};

}  // namespace fa
