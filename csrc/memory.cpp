// SPDX-License-Identifier: Apache-2.0
// Rules of addresses, as validate.cpp has those of shapes: what has elements has memory, and what is written is no other
// tensor's. Tensors have the names that the adapters' users know. Called by launch and launch_backward, since a plan is made
// before there is memory, and by an adapter that writes tensors beside a launch.
#include <string>

#include "backward.h"
#include "overlap.h"
#include "rules.h"
#include "semantics/cache.h"

namespace fa {
namespace {

struct Tensor {
  const char* name;
  const TensorView* view;
  Span span;
  const char* past_name;   // of what is written: whose very memory it may be …
  const TensorView* past;  // … null: nobody's
};

/// Those tensors of a call that have elements.
class Tensors {
 public:
  void add(const char* name, const TensorView& view, const char* past_name = nullptr, const TensorView* past = nullptr) {
    if (view.present && !view.empty()) tensors_[count_++] = {name, &view, span_of(view), past_name, past};
  }
  const Tensor* begin() const { return tensors_; }
  const Tensor* end() const { return tensors_ + count_; }

 private:
  static constexpr int kMost = 40;  // of one kind: StepParams has 36, and Gradients 7
  Tensor tensors_[kMost];
  int count_ = 0;
};

void add_inputs(const StepParams& p, Tensors* read) {
  const CacheParams& c = p.cache;
  read->add("query", p.query);
  read->add("key", c.new_key.present ? c.new_key : p.key);
  read->add("value", c.new_value.present ? c.new_value : p.value);
  read->add("mask", p.mask);
  read->add("bias", p.bias);
  read->add("past_key", c.past_key);
  read->add("past_value", c.past_value);
  read->add("kv_lengths", p.kv_lengths);
  read->add("query_lengths", p.query_lengths);
  read->add("cu_seqlens_q", p.cu_seqlens_q);
  read->add("cu_seqlens_kv", p.cu_seqlens_kv);
  read->add("query_offsets", p.query_offsets);
  read->add("alibi_slopes", p.alibi_slopes);
  read->add("sinks", p.sinks);
  read->add("write_indices", c.write_indices);
  read->add("cos_cache", p.rotary.cos);
  read->add("sin_cache", p.rotary.sin);
  read->add("position_ids", p.rotary.position_ids);
  read->add("q_norm_weight", p.norm.query_weight);
  read->add("k_norm_weight", p.norm.key_weight);
  read->add("k_scale", c.key_scale);
  read->add("v_scale", c.value_scale);
  read->add("block_table", c.block_table);
  read->add("slot_mapping", c.slot_mapping);
  read->add("query_descale", p.query_descale);
  read->add("key_descale", p.key_descale);
  read->add("value_descale", p.value_descale);
  read->add("output_scale", p.output_scale);
  read->add("query_bias", p.query_bias);
  read->add("empty_row_value", p.empty_row_value);
}

/// Has `present`, which may have more rows, the elements of `past` where `past` has them?
bool is_in_place(const TensorView& past, const TensorView& present) {
  bool same = past.present && past.data == present.data;
  for (int i = 0; i < 4; ++i) same = same && (past.shape[i] <= 1 || past.stride[i] == present.stride[i]);
  return same;
}

/// What a step writes, but for its memory of a windowed cache, which is nobody else's.
void add_outputs(const StepParams& p, Tensors* written) {
  const CacheParams& c = p.cache;
  written->add("output", p.out);
  written->add("lse", p.lse);
  const bool in_pages = c.mode == CacheMode::kPaged;
  const auto stores = [](const TensorView& fresh, const TensorView& past, const TensorView& cache) {
    return fresh.present && !(fresh.empty() && is_in_place(past, cache));
  };
  const char *key = in_pages ? "past_key" : "present_key", *value = in_pages ? "past_value" : "present_value";
  if (stores(c.new_key, c.past_key, p.key)) written->add(key, p.key, "past_key", &c.past_key);
  if (stores(c.new_value, c.past_value, p.value)) written->add(value, p.value, "past_value", &c.past_value);
  written->add("present_key", c.present_key, "past_key", &c.past_key);
  written->add("present_value", c.present_value, "past_value", &c.past_value);
}

Status check_data(const Tensors& tensors) {
  for (const Tensor& t : tensors) FA_RULE(t.view->data != nullptr, std::string(t.name) + " has elements but no data");
  return {};
}

bool share_memory(const Tensor& a, const Tensor& b) {
  return a.span.begin < b.span.end && b.span.begin < a.span.end && overlap(*a.view, *b.view);
}

/// The sentence of one that is written.
std::string shares(const Tensor& written, const Tensor& other, CacheMode mode) {
  std::string sentence = std::string(written.name) + " shares memory with " + other.name + "; ";
  if (written.past != nullptr && mode == CacheMode::kPaged) return sentence + "a paged cache is changed in place";
  sentence += "give it memory of its own";
  if (written.past != nullptr && mode != CacheMode::kAppend) sentence += std::string(", or just that of ") + written.past_name;
  return sentence;
}

/// What is written shares no memory with what is read, nor with anything else that is written.
Status check_apart(const Tensors& written, const Tensors& read, CacheMode mode) {
  for (const Tensor& w : written) {
    for (const Tensor& r : read) {
      if (!share_memory(w, r)) continue;
      FA_RULE(r.view == w.past && is_in_place(*r.view, *w.view), shares(w, r, mode));
    }
    for (const Tensor* before = written.begin(); before != &w; ++before)
      FA_RULE(!share_memory(w, *before), shares(w, *before, mode));
  }
  return {};
}

/// In place or not: keys and values alike. Pages are always in place.
Status check_places(const StepParams& p) {
  const CacheParams& c = p.cache;
  if (!c.past_key.present || !c.past_value.present || is_staged(c)) return {};
  const bool key = c.past_key.data == p.key.data, value = c.past_value.data == p.value.data;
  FA_RULE(key == value || c.past_key.empty() || c.past_value.empty(),
          std::string("present_") + (key ? "key" : "value") + " is the memory of its past and present_" +
              (key ? "value" : "key") + " is not; expected both in place or none");
  FA_RULE(c.mode != CacheMode::kPaged || key || p.key.empty(),
          "present_key is other memory than past_key; a paged cache is changed in place: bind both to one buffer");
  return {};
}

}  // namespace

Status check_memory(const StepParams& params, std::initializer_list<NamedTensor> also_written) {
  Tensors read, written;
  add_inputs(params, &read);
  add_outputs(params, &written);
  for (const auto& [name, tensor] : also_written) written.add(name, tensor);
  FA_CHECK(check_data(read));
  FA_CHECK(check_data(written));
  FA_CHECK(check_places(params));
  return check_apart(written, read, params.cache.mode);
}

Status check_memory(const StepParams& params, const Gradients& gradients) {
  Tensors read, written;
  add_inputs(params, &read);
  read.add("output", params.out);
  read.add("lse", params.lse);
  read.add("d_output", gradients.d_out);
  read.add("d_lse", gradients.d_lse);
  written.add("d_query", gradients.d_query);
  written.add("d_key", gradients.d_key);
  written.add("d_value", gradients.d_value);
  written.add("d_bias", gradients.d_bias);
  written.add("d_sinks", gradients.d_sinks);
  FA_CHECK(check_data(read));
  FA_CHECK(check_data(written));
  return check_apart(written, read, CacheMode::kAppend);
}

}  // namespace fa
