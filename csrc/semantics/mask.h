// SPDX-License-Identifier: Apache-2.0
// Which keys a query row sees. One MaskRule serves the CPU kernel, the CUDA kernels and the tests: visible() decides an element,
// key_range() the span of keys that a tile of rows can see at all, full_range() the span that all its rows see entirely.
// Positions are those of one sequence (batch entry); 64-bit, so that no length overflows.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FA_HD __host__ __device__ __forceinline__
#else
// NOTE: never out of line: sources compiled for AVX-512 must not leave a copy that the linker gives to the baseline.
#define FA_HD inline __attribute__((always_inline))
#endif

namespace fa {

struct KeyRange {
  int64_t begin;  // first key
  int64_t end;    // one past the last; begin >= end is an empty range
};

/// Keys begin … end - 1, in 32 bits; begin >= end is empty.
struct KeySpan {
  int32_t begin, end;
};

/// A MaskRule's windows for kernels with 32-bit positions (rows and keys up to 2^29): of the keys begin … end - 1 that there are
/// at all, row i sees those from i + left to i + right - 1.
struct RowBand {
  int32_t left, right;

  FA_HD int32_t first(int32_t row, int32_t begin) const { return row + left > begin ? row + left : begin; }
  FA_HD int32_t end(int32_t row, int32_t end) const { return row + right < end ? row + right : end; }

  /// Of `keys`, the smallest span that holds what any of the rows first_row … last_row sees.
  FA_HD KeySpan seen_by_some(int32_t first_row, int32_t last_row, KeySpan keys) const {
    return {first(first_row, keys.begin), end(last_row, keys.end)};
  }
  /// … and the span that every one of them sees: tiles inside it need no element test.
  FA_HD KeySpan seen_by_all(int32_t first_row, int32_t last_row, KeySpan keys) const {
    return {first(last_row, keys.begin), end(first_row, keys.end)};
  }
};

/// Tiles of tile_keys keys that a span touches, and those that lie inside it.
FA_HD KeySpan tiles_touched(KeySpan keys, int32_t tile_keys) {
  return {keys.begin / tile_keys, (keys.end + tile_keys - 1) / tile_keys};
}
FA_HD KeySpan tiles_inside(KeySpan keys, int32_t tile_keys) {
  return {(keys.begin + tile_keys - 1) / tile_keys, keys.end / tile_keys};
}

struct MaskRule {
  int64_t kv_length;     // keys in use
  int64_t query_offset;  // position of row 0 among the keys
  int64_t window_left;   // -1 = open
  int64_t window_right;  // -1 = open, 0 = causal

  /// May row i attend key j? (User-given masks and biases come on top.)
  FA_HD bool visible(int64_t i, int64_t j) const {
    const int64_t p = i + query_offset;
    return j >= 0 && j < kv_length && (window_left < 0 || j >= p - window_left) && (window_right < 0 || j <= p + window_right);
  }

  FA_HD RowBand band() const {
    const int64_t left = query_offset - window_left, right = query_offset + window_right + 1;
    return {window_left < 0 ? -kFar : clamped(left), window_right < 0 ? kFar : clamped(right)};
  }

  /// The smallest span that holds every key seen by any of the rows first_row … last_row (inclusive).
  FA_HD KeyRange key_range(int64_t first_row, int64_t last_row) const {
    int64_t begin = 0, end = kv_length;
    if (window_left >= 0 && first_row + query_offset - window_left > begin) begin = first_row + query_offset - window_left;
    if (window_right >= 0 && last_row + query_offset + window_right + 1 < end) end = last_row + query_offset + window_right + 1;
    return {begin, end > begin ? end : begin};
  }

  /// The largest span of keys that every one of the rows sees: tiles inside it need no element test.
  FA_HD KeyRange full_range(int64_t first_row, int64_t last_row) const {
    int64_t begin = 0, end = kv_length;
    if (window_left >= 0 && last_row + query_offset - window_left > begin) begin = last_row + query_offset - window_left;
    if (window_right >= 0 && first_row + query_offset + window_right + 1 < end) end = first_row + query_offset + window_right + 1;
    return {begin, end > begin ? end : begin};
  }

 private:
  static constexpr int32_t kFar = 1 << 30;

  static FA_HD int32_t clamped(int64_t x) { return static_cast<int32_t>(x < -kFar ? -kFar : x > kFar ? kFar : x); }
};

}  // namespace fa
