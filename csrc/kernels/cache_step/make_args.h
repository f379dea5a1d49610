// SPDX-License-Identifier: Apache-2.0
// Which blocks of a cache step do what, and in what units rows are moved. Host only; used by cache_step.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "kernels/cache_step/args.h"
#include "kernels/cache_step/cache_step.h"
#include "kernels/common/aligned_rows.h"

namespace fa::cache_step {

/// The largest unit that rows of both tensors are made of, and begin at multiples of.
inline int common_unit(const TensorView& a, const TensorView& b) {
  for (const int bytes : {16, 4, 2})
    if (rows_aligned_to(a, bytes) && rows_aligned_to(b, bytes) && b.shape[3] * size_of(b.dtype) % bytes == 0) return bytes;
  return 1;
}

inline Units units_of(const StepParams& p, const Step& step, int which) {
  const CacheParams& c = p.cache;
  const TensorView& cache = which == 0 ? p.key : p.value;
  const TensorView &past = which == 0 ? c.past_key : c.past_value, &present = which == 0 ? c.present_key : c.present_value;
  const TensorView &fresh = which == 0 ? c.new_key : c.new_value, &gathered = step.gathered[which];
  Units units{};
  units.past = common_unit(past.present ? past : cache, cache);
  units.fresh = common_unit(fresh.present ? fresh : cache, cache);
  units.present = common_unit(present.present ? present : cache, cache);
  units.gathered = common_unit(gathered.present ? gathered : cache, cache);
  const int64_t bytes_of_8 = cache.dtype == DType::kUInt8 ? 4 : 8;
  units.gather_by_8 = gathered.present && gathered.shape[3] % 8 == 0 && rows_aligned_to(cache, bytes_of_8);
  return units;
}

/// False: more rows and chunks than 32 bits can number.
inline bool make_args(const StepParams& p, const Step& step, Args* args) {
  const CacheParams& c = p.cache;
  *args = Args{};
  args->p = p;
  args->rule = cache_rule(p);
  args->query = step.query;
  args->mask = step.mask;
  args->bias = step.bias;
  args->kv_lengths = static_cast<int64_t*>(step.kv_lengths.data);
  args->query_offsets = static_cast<int64_t*>(step.query_offsets.data);
  args->cu_seqlens_kv = static_cast<int32_t*>(step.cu_seqlens_kv.data);
  args->element_bytes = static_cast<int>(size_of(p.query.dtype));
  for (int which = 0; which < 2; ++which) {
    args->gathered[which] = step.gathered[which];
    args->units[which] = units_of(p, step, which);
    args->cache_bytes[which] = static_cast<int>(size_of((which == 0 ? p.key : p.value).dtype));
  }

  const bool paged = c.mode == CacheMode::kPaged, has_new = c.new_key.present && !c.new_key.empty();
  const bool is_in_place = paged || (c.past_key.present && c.past_key.data == p.key.data);
  const bool slides = c.mode == CacheMode::kWindow && is_in_place;
  const int64_t heads = p.key.shape[1], sequences = num_sequences(p), pairs = sequences * heads * 2;
  const int64_t chunks = ((paged ? args->rule.rows : p.key.shape[2]) + kChunkRows - 1) / kChunkRows;
  args->chunks = static_cast<unsigned>(chunks);
  const auto per_warp = [](int64_t rows) { return (rows + kWarps - 1) / kWarps; };
  const auto rows_of = [](const TensorView& t) { return t.shape[0] * t.shape[1] * t.shape[2]; };
  const auto mask_rows = [](const TensorView& t) {
    return !t.present ? 0 : t.shape[0] * (t.stride[1] != 0 ? t.shape[1] : 1) * (t.stride[2] != 0 ? t.shape[2] : 1);
  };
  const int64_t counts[] = {
      step.query.present ? per_warp(rows_of(p.query)) : 0,
      has_new && !slides ? per_warp(rows_of(c.new_key) * (c.new_value.present ? 2 : 1)) : 0,
      c.past_key.present && !is_in_place ? pairs * chunks : 0,
      slides ? pairs : 0,
      per_warp(std::max(mask_rows(step.mask), mask_rows(step.bias))),
      step.query_offsets.present && sequences > 0 ? 1 : 0,
      step.gathered[0].present || step.gathered[1].present ? pairs * chunks : 0,
      is_staged(c) && (c.present_key.present || c.present_value.present) ? pairs * chunks : 0,
  };
  unsigned* const blocks[] = {&args->query_blocks, &args->new_blocks,    &args->past_blocks,   &args->window_blocks,
                              &args->mask_blocks,  &args->length_blocks, &args->gather_blocks, &args->keep_blocks};
  int64_t all = 0;
  for (int i = 0; i < 8; ++i) {
    all += counts[i];
    if (all > std::numeric_limits<int32_t>::max() / kWarps) return false;
    *blocks[i] = static_cast<unsigned>(counts[i]);
  }
  return true;
}

}  // namespace fa::cache_step
