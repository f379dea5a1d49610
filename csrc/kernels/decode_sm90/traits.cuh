// SPDX-License-Identifier: Apache-2.0
// One instance of decode_sm90: element type and head_dim bucket, and what follows from them.
#pragma once

#include "kernels/decode_sm90/config.h"

namespace fa::decode_sm90 {

template <class T_, int kHeadDim_>
struct Traits {
  using T = T_;
  static constexpr TileShape kTile = tile_shape(kHeadDim_);
  static constexpr int kHeadDim = kHeadDim_, kWarps = kTile.warps, kThreads = 32 * (kWarps + 1), kTileN = kTile.tile_n;
  static constexpr int kPanels = kHeadDim / kPanelColumns, kPanelBytes = kTileN * 128;  // of keys, and of values
  static constexpr int kStageBytes = stage_bytes(kHeadDim), kValueOffset = kStageBytes / 2;
  static constexpr int kKeyBlocks = kTileN / 8, kDimBlocks = kHeadDim / 8;  // of matrix instructions
};

}  // namespace fa::decode_sm90
