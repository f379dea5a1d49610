// SPDX-License-Identifier: Apache-2.0
// Cuts a problem into tasks (sequence, heads, block of rows, and where rows are few a span of keys), spreads them over the host's
// threads, largest first, and merges what was split. Called through the dispatch table; computes with tile_kernel.cpp.
// The cut depends on shapes and lengths, and the sum of a row on neither threads nor its neighbours: results are bitwise
// repeatable.
#include "cpu/attention_cpu.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "cpu/tile.h"
#include "cpu/workers.h"

namespace fa::cpu {

namespace baseline {
extern const Isa kIsa;
}
#ifdef FA_CPU_X86
namespace avx2 {
extern const Isa kIsa;
}
namespace avx512 {
extern const Isa kIsa;
}
#endif

const Isa& best_isa() {
#ifdef FA_CPU_X86
  static const Isa* const best = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    // FA_CPU_ISA=baseline or avx2 asks for less, to compare and to test.
    const char* asked = std::getenv("FA_CPU_ISA");
    if (asked != nullptr && std::strcmp(asked, "baseline") == 0) return &baseline::kIsa;
    if (asked != nullptr && std::strcmp(asked, "avx2") == 0 && avx2) return &avx2::kIsa;
    return avx512 ? &avx512::kIsa : avx2 ? &avx2::kIsa : &baseline::kIsa;
  }();
  return *best;
#else
  return baseline::kIsa;
#endif
}

namespace {

constexpr int64_t kBlockRows = 6;                              // rows of a register block
constexpr int64_t kRowsPerTask[] = {1152, 576, 288, 144, 48};  // multiples of it; the first that gives every thread some tasks
constexpr int64_t kFewRows = 32;                               // up to here the heads that share keys go into one task
constexpr int64_t kKeysPerSplit = 1024;                        // and the keys are split
constexpr int64_t kTileBytes = 256 << 10;  // packed keys and values of a tile: half of a small second-level cache

struct Cut {
  std::vector<Task> tasks;   // in the order of their start
  std::vector<Task> merges;  // those whose keys were split, once each
  std::vector<float> partials;
};

/// Keys that the task's rows can see: what it costs, per row.
int64_t num_keys(const Tiling& tiling, const Task& t) {
  const KeyRange range = tiling.steps.at(t.sequence_idx).sequence.mask.key_range(t.first_row, t.first_row + t.num_rows - 1);
  return std::max<int64_t>(0, std::min(range.end, t.key_end) - std::max(range.begin, t.key_begin));
}

/// Adds the blocks of rows of one sequence.
void cut_sequence(const Tiling& tiling, int64_t sequence_idx, std::vector<Task>* tasks) {
  const Sequence s = tiling.steps.at(sequence_idx).sequence;
  const int64_t heads = tiling.params.query.shape[1], group = heads / tiling.params.key.shape[1];
  const int64_t heads_per_task = s.query_length * group <= kFewRows ? group : 1;
  // Blocks of nearly equal length: a short last one would pack all keys for a few rows.
  const int64_t most = std::max<int64_t>(1, tiling.rows_per_task / heads_per_task);
  const int64_t num_blocks = std::max<int64_t>(1, (s.query_length + most - 1) / most);
  const int64_t rows =
      std::min(most, ((s.query_length + num_blocks - 1) / num_blocks + kBlockRows - 1) / kBlockRows * kBlockRows);
  for (int64_t head = 0; head < heads; head += heads_per_task) {
    for (int64_t row = 0; row < s.query_length; row += rows) {
      tasks->push_back(
          {sequence_idx, head / group, head, heads_per_task, row, std::min(rows, s.query_length - row), 0, s.mask.kv_length});
    }
  }
}

/// Replaces each task of few rows and many keys by one for each span of keys; those of the same keys follow one another, since
/// the heads of a row often lie side by side in memory.
void split_keys(const Tiling& tiling, Cut* cut) {
  const int64_t partial_floats = 2 + tiling.params.out.shape[3];
  std::vector<Task> tasks;
  int64_t most_splits = 0, total = 0;
  for (Task& task : cut->tasks) {
    task.num_splits = (task.key_end + kKeysPerSplit - 1) / kKeysPerSplit;
    if (task.num_heads * task.num_rows > kFewRows || task.num_splits < 2) {
      task.num_splits = 1;
      tasks.push_back(task);
      continue;
    }
    cut->merges.push_back(task);
    most_splits = std::max(most_splits, task.num_splits);
    total += task.num_splits * task.num_heads * task.num_rows * partial_floats;
  }
  cut->partials.resize(total);
  float* next = cut->partials.data();
  for (Task& task : cut->merges) {
    task.partials = next;
    next += task.num_splits * task.num_heads * task.num_rows * partial_floats;
  }
  for (int64_t i = 0; i < most_splits; ++i) {
    for (const Task& task : cut->merges) {
      if (i >= task.num_splits) continue;
      tasks.push_back(task);
      tasks.back().partials += i * task.num_heads * task.num_rows * partial_floats;
      tasks.back().key_begin = i * kKeysPerSplit;
      tasks.back().key_end = std::min(task.key_end, (i + 1) * kKeysPerSplit);
    }
  }
  cut->tasks = std::move(tasks);
}

Cut cut_problem(Tiling* tiling, int64_t threads) {
  Cut cut;
  for (int64_t rows : kRowsPerTask) {
    tiling->rows_per_task = rows;
    cut.tasks.clear();
    for (int64_t i = 0; i < num_sequences(tiling->params); ++i) cut_sequence(*tiling, i, &cut.tasks);
    if (threads == 1 || static_cast<int64_t>(cut.tasks.size()) >= 4 * threads) break;
  }
  split_keys(*tiling, &cut);
  int64_t largest = 1;
  std::vector<std::pair<int64_t, size_t>> order;
  for (size_t i = 0; i < cut.tasks.size(); ++i) {
    const Task& task = cut.tasks[i];
    largest = std::max(largest, task.num_heads * task.num_rows);
    order.push_back({-task.num_heads * task.num_rows * num_keys(*tiling, task), i});
  }
  tiling->rows_per_task = largest;
  std::sort(order.begin(), order.end());
  std::vector<Task> sorted;
  for (const auto& entry : order) sorted.push_back(cut.tasks[entry.second]);
  cut.tasks = std::move(sorted);
  return cut;
}

/// Rows of the output that belong to no sequence in use: 0, and lse -inf.
void clear_rows(const StepParams& p, int64_t b, int64_t begin, int64_t end) {
  const size_t bytes = p.out.shape[3] * size_of(p.out.dtype);
  for (int64_t h = 0; h < p.out.shape[1]; ++h) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t offset = b * p.out.stride[0] + h * p.out.stride[1] + i * p.out.stride[2];
      std::memset(static_cast<char*>(p.out.data) + offset * (bytes / p.out.shape[3]), 0, bytes);
      if (p.lse.present)
        static_cast<float*>(p.lse.data)[b * p.lse.stride[0] + h * p.lse.stride[1] + i * p.lse.stride[2]] = -INFINITY;
    }
  }
}

void clear_unused_rows(const Tiling& tiling) {
  const bool packed = tiling.params.cu_seqlens_q.present;
  int64_t reached = 0;  // first row after the packed sequences so far
  for (int64_t i = 0; i < num_sequences(tiling.params); ++i) {
    const Sequence s = tiling.steps.at(i).sequence;
    if (packed) clear_rows(tiling.params, 0, reached, s.first_row);
    clear_rows(tiling.params, s.batch_idx, s.first_row + s.query_length, s.first_row + s.num_rows);
    reached = s.first_row + s.num_rows;
  }
  if (packed) clear_rows(tiling.params, 0, reached, tiling.params.query.shape[2]);
}

/// The cache step of all sequences and heads, keys and values.
struct Store {
  const StepParams& params;
  const CacheRule steps;
  const Isa& isa;
  std::atomic<bool> out_of_memory{false};

  int64_t heads() const { return params.cache.new_key.shape[1]; }
  size_t num_tasks() const { return 2 * num_sequences(params) * heads(); }

  static void run(void* self_, size_t i) {
    Store& self = *static_cast<Store*>(self_);
    const int64_t head = static_cast<int64_t>(i / 2) % self.heads(), sequence = static_cast<int64_t>(i / 2) / self.heads();
    std::unique_ptr<void, FreeDeleter> scratch(std::malloc(self.isa.store_bytes(self.params)));
    if (scratch == nullptr) {
      self.out_of_memory = true;
      return;
    }
    if (i % 2 == 1 && !self.params.cache.new_value.present) return;
    self.isa.store(self.params, self.steps, static_cast<int>(i % 2), sequence, head, scratch.get());
  }
};

/// Elements of the past that the step copies, and of the new rows.
int64_t moved_elements(const StepParams& p) {
  const CacheParams& c = p.cache;
  const auto count = [](const TensorView& t) { return t.present ? t.shape[0] * t.shape[1] * t.shape[2] * t.shape[3] : 0; };
  const bool copies = c.mode != CacheMode::kPaged && c.past_key.data != p.key.data;
  return count(c.new_key) + (copies ? count(c.past_key) : 0);
}

/// What a staged windowed cache keeps after the step: the last rows of the stage.
void keep_window(const StepParams& p, const CacheRule& steps) {
  for (int64_t b = 0; b < num_sequences(p); ++b) {
    const CacheStep step = steps.at(b);
    const int64_t length = step.first_position + step.sequence.mask.kv_length, kept = steps.resident(length);
    for (int which = 0; which < 2; ++which) {
      const TensorView& stage = which == 0 ? p.key : p.value;
      const TensorView& present = which == 0 ? p.cache.present_key : p.cache.present_value;
      const int64_t size = size_of(stage.dtype), bytes = stage.shape[3] * size, first = step.sequence.mask.kv_length - kept;
      for (int64_t h = 0; h < present.shape[1]; ++h) {
        for (int64_t i = 0; i < present.shape[2]; ++i) {
          char* target =
              static_cast<char*>(present.data) + (b * present.stride[0] + h * present.stride[1] + i * present.stride[2]) * size;
          const char* source = static_cast<const char*>(stage.data) +
                               (b * stage.stride[0] + h * stage.stride[1] + (first + i) * stage.stride[2]) * size;
          if (i < kept) {
            std::memcpy(target, source, bytes);
          } else {
            std::memset(target, 0, bytes);
          }
        }
      }
    }
  }
}

}  // namespace

Status store(const StepParams& params, const ExecutionContext& context) {
  constexpr int64_t kWorthThreads = 1 << 16;  // fewer elements are moved before another thread has started
  Store step{params, cache_rule(params), best_isa()};
  if (context.parallel_for != nullptr && moved_elements(params) > kWorthThreads) {
    context.parallel_for(context.pool, step.num_tasks(), Store::run, &step);
  } else {
    for (size_t i = 0; i < step.num_tasks(); ++i) Store::run(&step, i);
  }
  if (step.out_of_memory) return {StatusCode::kUnsupported, "out of memory: the CPU kernel could not store the new rows"};
  return {};
}

bool plan(const StepParams&, Plan*, std::string*) { return true; }

Status launch(const Plan&, const StepParams& params, const ExecutionContext& context) {
  try {
    const int64_t dims = params.query.shape[3] + params.out.shape[3];
    const int64_t tile = kTileBytes / (4 * dims) / 64 * 64;
    Tiling tiling{params, cache_rule(params), 0, std::min(kMaxKeysPerTile, std::max<int64_t>(64, tile))};
    const Cut cut = cut_problem(&tiling, num_threads(context));
    clear_unused_rows(tiling);
    const Isa& isa = best_isa();
    const auto run_each = [&](const std::vector<Task>& tasks, void (*run)(const Tiling&, const Task&, void*)) {
      return run_tasks(tasks.size(), isa.scratch_bytes(tiling), context,
                       [&](size_t i, void* scratch) { run(tiling, tasks[i], scratch); });
    };
    if (Status status = run_each(cut.tasks, isa.attend); !status.ok()) return status;
    if (Status status = run_each(cut.merges, isa.merge); !status.ok()) return status;
    if (tiling.steps.is_staged && params.cache.present_key.present) keep_window(params, tiling.steps);
    return {};
  } catch (const std::bad_alloc&) {
    return {StatusCode::kUnsupported, "out of memory: the CPU kernel could not list its tasks"};
  }
}

}  // namespace fa::cpu
