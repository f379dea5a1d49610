// SPDX-License-Identifier: Apache-2.0
// One instance of decode_sm90: element types and head_dim bucket, and what follows from them.
#pragma once

#include <type_traits>

#include "kernels/common/convert.cuh"
#include "kernels/decode_sm90/config.h"
#include "kernels/decode_sm90/instances.h"

namespace fa::decode_sm90 {

template <class T_, int kHeadDim_, Variant kStored>
struct Traits {
  using T = T_;  // of queries and output
  static constexpr bool kIsQuantized = kStored != Variant::kAsQuery;
  using Stored = std::conditional_t<!kIsQuantized, T, std::conditional_t<kStored == Variant::kInt8, int8_t, Float8>>;
  using Operand = std::conditional_t<kIsQuantized, __half, T>;  // of matrix instructions
  static constexpr TileShape kTile = tile_shape(kHeadDim_);
  static constexpr int kHeadDim = kHeadDim_, kWarps = kTile.warps, kThreads = 32 * (kWarps + 1), kTileN = kTile.tile_n;
  static constexpr int kRowBytes = kHeadDim * static_cast<int>(sizeof(Stored)), kTileBytes = 2 * kTileN * kRowBytes;
  // How many tiles' copies start side by side: always; or at most, at the start of a short piece and in a long share.
  static constexpr int kAlwaysTogether = kTileBytes < kBytesTogether ? kBytesTogether / kTileBytes : 1;
  static constexpr int kMostTogether = kTileBytes == kBytesTogether ? kTilesTogether : kAlwaysTogether;
  static constexpr int kPanels = num_panels(kRowBytes), kPanelColumns = kPanelRowBytes / static_cast<int>(sizeof(Stored));
  static constexpr int kPanelBytes = kTileN * kPanelRowBytes;                                    // of keys, and of values
  static constexpr int kStageBytes = 2 * kPanels * kPanelBytes, kValueOffset = kStageBytes / 2;  // a panel may have idle columns
  static constexpr int kMostStages = most_stages(kIsQuantized);                                  // of the ring
  static constexpr int kKeyBlocks = kTileN / 8, kDimBlocks = kHeadDim / 8;                       // of matrix instructions
};

}  // namespace fa::decode_sm90
