// SPDX-License-Identifier: Apache-2.0
// Equal ranges of key tiles, one a block, and what each has of every head. The tiles of all heads stand in one row; units are key
// tiles. A cut near to the end of a head is moved there, so that few heads have parts. No CUDA, so that tests can try all cuts.
// Called by schedule.cuh, pieces.cuh and launch.cuh.
#pragma once

#include "kernels/decode_sm90/config.h"
#include "semantics/sequence.h"

namespace fa::decode_sm90 {

/// How the key tiles of all heads, one head after the other, are cut into one range a block. A head without keys counts as one.
struct Schedule {
  int units, blocks;
  int per_block, extra;  // the first `extra` blocks have one more
  int snap;              // a cut at most so far from an end of a head is moved there
};

/// For a grid of at most `blocks`.
FA_HD Schedule cut(int units, int blocks) {
  const int most = units / kMinUnitsPerBlock;
  Schedule s{};
  s.units = units;
  s.blocks = blocks < most ? blocks : most > 1 ? most : 1;
  s.per_block = units / s.blocks;
  s.extra = units - s.per_block * s.blocks;
  s.snap = s.per_block / kUnitsPerSnap < kMaxSnap ? s.per_block / kUnitsPerSnap : kMaxSnap;
  return s;
}

/// Where the range of a block begins, or of the last one ends, before it is moved to an end of a head.
FA_HD int cut_of(const Schedule& s, int block) { return block * s.per_block + (block < s.extra ? block : s.extra); }

/// The last block whose range begins at `unit` or before.
FA_HD int block_of(const Schedule& s, int unit) {
  const int in_larger = s.extra * (s.per_block + 1);
  return unit < in_larger ? unit / (s.per_block + 1) : s.extra + (unit - in_larger) / s.per_block;
}

/// Units from … to - 1.
struct UnitRange {
  int from, to;
};

/// What the block whose range goes from `begin` to `end` has of the head of these units: nothing where from is not below to.
/// Where both ends of the head are near to a cut, it is moved to the last, by the blocks on either side alike.
FA_HD UnitRange part_of_head(const UnitRange& head, int begin, int end, int snap) {
  UnitRange part = head;
  if (begin > head.from && head.to - begin <= snap) return {head.to, head.to};
  if (begin - head.from > snap) part.from = begin;
  if (head.to - end > snap) part.to = end - head.from > snap ? end : head.from;
  return part;
}

/// How many blocks have parts of the head, and the first of them. Of a head that one block has, `first_block` may be another.
struct HeadParts {
  int first_block, count;
};

FA_HD HeadParts parts_of_head(const Schedule& s, const UnitRange& head) {
  const int first_block = block_of(s, head.from + s.snap), more = block_of(s, head.to - s.snap - 1) - first_block;
  return {first_block, 1 + (more > 0 ? more : 0)};
}

}  // namespace fa::decode_sm90
