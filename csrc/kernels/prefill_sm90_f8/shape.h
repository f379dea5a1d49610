// SPDX-License-Identifier: Apache-2.0
// The tiles of each instance of prefill_sm90_f8 (docs/float8.md). Read on the host and by traits.cuh.
#pragma once

namespace fa::prefill_sm90_f8 {

/// kModified: softcap, bias, ALiBi, masks; and log-sum-exp, which wants sums of weights before they are rounded. kPlain has none
/// of their code, whose registers would be taken from its loop.
enum class Variant { kPlain, kModified };

/// When a warpgroup's turn ends.
enum class TurnEnd {
  kScoresIssued,  // the product of the next scores has been issued
  kLastStep,      // it is there but for its last step, of 32 columns
  kScoresThere,
};

struct TileShape {
  int warpgroups;   // that multiply, each 64 query rows
  int tile_n;       // keys: those of one row of transposed values
  int sum_columns;  // of the product with the values, at a time
  int key_stages, raw_stages, value_stages, query_stages;
  bool takes_turns;  // warpgroups issue their products in turn
  TurnEnd turn_end;
  bool sums_weights;         // by the tensor cores
  bool ones_behind = false;  // their product is waited for behind the next scores
};

/// The tile table, found by measurement (docs/experiments/float8.md).
constexpr TileShape tile_shape(int head_dim, Variant variant) {
  const bool plain = variant == Variant::kPlain;
  if (head_dim <= 64) return {plain ? 3 : 2, 128, 64, 3, 2, 3, 2, true, TurnEnd::kScoresThere, plain};
  if (head_dim <= 128 && plain) return {3, 128, 64, 3, 2, 3, 2, true, TurnEnd::kScoresIssued, true, true};
  if (head_dim <= 128) return {2, 128, 128, 3, 2, 3, 2, true, TurnEnd::kScoresThere, false};
  return {2, 128, 64, 2, 2, 2, 1, true, plain ? TurnEnd::kLastStep : TurnEnd::kScoresThere, plain};
}

}  // namespace fa::prefill_sm90_f8
