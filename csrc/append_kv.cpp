// SPDX-License-Identifier: Apache-2.0
// Past rows and then fresh rows into present: what a step with a cache does before attention. Here the checks and the CPU's copy.
// Called by the adapters through fa/attention.h.
#include "append_kv.h"

#include <cstring>

#include "dispatch.h"

namespace fa {
namespace {

Status check(const TensorView& past, const TensorView& fresh, const TensorView& present) {
  for (int i = 0; i < 4; ++i) {
    const int64_t sum = i == 2 ? past.shape[2] + fresh.shape[2] : past.shape[i];
    if ((i == 2 || past.shape[i] == fresh.shape[i]) && present.shape[i] == sum) continue;
    return {StatusCode::kInvalidArgument, "present has shape " + shape_text(present.shape, 4) + ", past " +
                                              shape_text(past.shape, 4) + " and fresh " + shape_text(fresh.shape, 4) +
                                              "; expected equal batch, heads and head_dim, and as many rows as both together"};
  }
  if (past.dtype != fresh.dtype || past.dtype != present.dtype) {
    return {StatusCode::kInvalidArgument, "past, fresh and present have different dtypes, expected the same"};
  }
  for (const TensorView* t : {&past, &fresh, &present}) {
    if (t->data == nullptr && !t->empty()) {
      return {StatusCode::kInvalidArgument, "past, fresh or present has elements but no data"};
    }
  }
  return {};
}

/// One batch entry of one head.
struct Copy {
  const TensorView &past, &fresh, &present;

  static void run(void* self_, size_t index) {
    const Copy& self = *static_cast<const Copy*>(self_);
    const int64_t heads = self.present.shape[1], b = static_cast<int64_t>(index) / heads, h = static_cast<int64_t>(index) % heads;
    self.rows(self.past, b, h, 0);
    self.rows(self.fresh, b, h, self.past.shape[2]);
  }

  void rows(const TensorView& from, int64_t b, int64_t h, int64_t first) const {
    const int64_t size = size_of(from.dtype);
    const bool contiguous = from.shape[3] <= 1 || (from.stride[3] == 1 && present.stride[3] == 1);
    for (int64_t i = 0; i < from.shape[2]; ++i) {
      const char* source =
          static_cast<const char*>(from.data) + (b * from.stride[0] + h * from.stride[1] + i * from.stride[2]) * size;
      const int64_t row = b * present.stride[0] + h * present.stride[1] + (first + i) * present.stride[2];
      char* target = static_cast<char*>(present.data) + row * size;
      if (contiguous) {
        std::memcpy(target, source, from.shape[3] * size);
        continue;
      }
      for (int64_t x = 0; x < from.shape[3]; ++x) {
        std::memcpy(target + x * present.stride[3] * size, source + x * from.stride[3] * size, size);
      }
    }
  }
};

}  // namespace

Status append_kv(const TensorView& past, const TensorView& fresh, const TensorView& present, const Device& device,
                 const ExecutionContext& context) {
  if (Status status = check(past, fresh, present); !status.ok()) return status;
  if (device.type == DeviceType::kCuda) {
#ifdef FA_WITH_CUDA
    return append_kv_cuda(past, fresh, present, device, context);
#else
    return {StatusCode::kUnsupported, kNoCuda};
#endif
  }
  Copy copy{past, fresh, present};
  const size_t count = present.shape[2] == 0 ? 0 : present.shape[0] * present.shape[1];
  if (context.parallel_for != nullptr) {
    context.parallel_for(context.pool, count, Copy::run, &copy);
  } else {
    for (size_t i = 0; i < count; ++i) Copy::run(&copy, i);
  }
  return {};
}

}  // namespace fa
