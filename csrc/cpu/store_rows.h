// SPDX-License-Identifier: Apache-2.0
// What a cache step stores of one head: the past's rows, where the cache is not the past's own memory, and the new rows,
// normalised, rotated and quantized on their way. Used by tile_kernel.cpp; compiled once for each instruction set.
#pragma once

#include "cpu/cache_rows.h"
#include "cpu/row_transform.h"
#include "cpu/tile.h"

namespace fa::cpu::FA_ISA {
namespace {  // no copy for the linker to share among instruction sets

class HeadStore {
 public:
  /// which: 0 keys, 1 values. memory: store_floats(params) floats.
  HeadStore(const StepParams& p, const CacheRule& rule, const CacheStep& step, int which, int64_t sequence_idx, int64_t head,
            float* memory)
      : p_(p),
        rule_(rule),
        step_(step),
        head_(head),
        fresh_(which == 0 ? p.cache.new_key : p.cache.new_value),
        past_(which == 0 ? p.cache.past_key : p.cache.past_value),
        cache_(which == 0 ? p.key : p.value),
        rows_(cache_rows(p, which, sequence_idx, step.sequence.batch_idx, head, 0)),
        floats_(memory),
        transform_(p, step, which == 0 ? p.norm.key_weight : TensorView{}, p.norm.key_epsilon, memory + rows_.columns),
        is_transformed_(which == 0 && (p.norm.key_weight.present || p.rotary.cos.present)),
        is_in_place_(past_.present && past_.data == cache_.data) {}

  static int64_t store_floats(const StepParams& p) {
    const int64_t d = p.query.shape[3], d_v = p.out.shape[3];
    return (d > d_v ? d : d_v) + RowTransform::transform_floats(d);
  }

  void run() {
    if (p_.cache.mode != CacheMode::kPaged) keep_past();
    for (int64_t i = 0; i < step_.num_new; ++i) {
      if (void* target = target_of(i)) store(i, target);
    }
  }

 private:
  char* cache_row(int64_t i) const { return const_cast<char*>(rows_.data) + i * rows_.stride_bytes; }

  /// Rows first_past … of the past become the first of the cache; those that nothing is written to are 0.
  void keep_past() {
    if (!past_.present || (is_in_place_ && step_.first_past == 0)) return;
    const int64_t size = size_of(past_.dtype), bytes = rows_.row_bytes();
    const char* from =
        static_cast<const char*>(past_.data) + (step_.sequence.batch_idx * past_.stride[0] + head_ * past_.stride[1]) * size;
    // NOTE: in place every row moves towards row 0, so that none is overwritten before it has moved.
    for (int64_t i = 0; i < step_.num_past; ++i) {
      std::memmove(cache_row(i), from + (step_.first_past + i) * past_.stride[2] * size, bytes);
    }
    for (int64_t i = step_.num_past; i < cache_.shape[2] && !is_in_place_; ++i) std::memset(cache_row(i), 0, bytes);
  }

  /// Where new row i goes; null: nowhere.
  void* target_of(int64_t i) const { return const_cast<void*>(rows_.at_slot(slot_of_new_row(p_, step_, rows_.table, i))); }

  void store(int64_t i, void* target) {
    const int64_t row = step_.first_fresh + i, size = size_of(fresh_.dtype);
    const char* source = static_cast<const char*>(fresh_.data) +
                         (step_.sequence.batch_idx * fresh_.stride[0] + head_ * fresh_.stride[1] + row * fresh_.stride[2]) * size;
    if (!is_transformed_ && !rows_.is_quantized()) {
      std::memcpy(target, source, rows_.row_bytes());
      return;
    }
    to_float(source, fresh_.dtype, floats_, rows_.columns);
    if (is_transformed_) transform_.apply(floats_, row, position_of_new_row(rule_, step_, i));
    write_row(rows_, floats_, target);
  }

  const StepParams& p_;
  const CacheRule& rule_;
  const CacheStep& step_;
  const int64_t head_;
  const TensorView &fresh_, &past_, &cache_;
  const Rows rows_;
  float* const floats_;
  const RowTransform transform_;
  const bool is_transformed_, is_in_place_;
};

}  // namespace
}  // namespace fa::cpu::FA_ISA
