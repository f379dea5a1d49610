// SPDX-License-Identifier: Apache-2.0
// fa/attention.h for the tests in this folder, as thin as can be: a NumPy array becomes a TensorView with its own strides, a
// field of StepParams a key of a dictionary. Unlike faplugin it knows nothing of the operator's layouts and broadcasting.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "fa/attention.h"
#include "fa/backward.h"
#include "fa/threads.h"
#include "overlap.h"

namespace py = pybind11;

void bind_semantics(py::module_& m);

namespace {

using fa::StepParams;
using fa::TensorView;

fa::DType dtype_of(const std::string& name) {
  for (int i = 0; i < fa::kNumDTypes; ++i) {
    if (name == fa::name_of(static_cast<fa::DType>(i))) return static_cast<fa::DType>(i);
  }
  throw py::type_error("no dtype of the operator: " + name);
}

/// `corrupt`: the strides of axes of size 1, which mean nothing, are filled with a number that would lead far away.
TensorView view(const py::array& array, bool corrupt) {
  TensorView t;
  t.data = array.size() == 0 ? nullptr : const_cast<void*>(array.data());
  t.dtype = dtype_of(array.dtype().attr("name").cast<std::string>());
  t.present = true;
  for (int i = 0; i < array.ndim(); ++i) {
    t.shape[i] = array.shape(i);
    t.stride[i] = array.strides(i) / array.itemsize();
  }
  for (int i = 0; i < 4 && corrupt; ++i) {
    if (t.shape[i] == 1) t.stride[i] = int64_t{1} << 40;
  }
  return t;
}

StepParams params_of(const py::dict& fields, bool corrupt) {
  StepParams p;
  for (const auto& item : fields) {
    const std::string name = item.first.cast<std::string>();
    bool known = false;
    // clang-format off
#define TENSOR(field) \
  if (name == #field) p.field = view(py::reinterpret_borrow<py::array>(item.second), corrupt), known = true;
#define SCALAR(field) \
  if (name == #field) p.field = item.second.cast<decltype(p.field)>(), known = true;
    TENSOR(query) TENSOR(key) TENSOR(value) TENSOR(out) TENSOR(lse) TENSOR(mask) TENSOR(bias) TENSOR(kv_lengths)
    TENSOR(query_lengths) TENSOR(cu_seqlens_q) TENSOR(cu_seqlens_kv) TENSOR(query_offsets) TENSOR(alibi_slopes) TENSOR(sinks)
    TENSOR(query_bias) TENSOR(empty_row_value) TENSOR(query_descale) TENSOR(key_descale) TENSOR(value_descale) TENSOR(output_scale)
    SCALAR(align_bottom_right) SCALAR(query_offset) SCALAR(window_left) SCALAR(window_right) SCALAR(softmax_scale) SCALAR(softcap)
#undef TENSOR
#undef SCALAR
    if (name == "empty_row_mean") p.empty_row = item.second.cast<bool>() ? fa::EmptyRow::kMean : fa::EmptyRow::kZero, known = true;
    // clang-format on
    if (!known) throw py::key_error(name);
  }
  if (p.empty_row_value.present) p.empty_row = fa::EmptyRow::kValue;
  return p;
}

py::tuple result(const fa::Status& status) { return py::make_tuple(static_cast<int>(status.code), status.sentence); }

py::tuple attention(const py::dict& fields, size_t num_threads, bool corrupt, const std::string& kernel) {
  const StepParams params = params_of(fields, corrupt);
  fa::Threads threads{num_threads};
  fa::ExecutionContext context;
  if (num_threads > 0) context.parallel_for = fa::Threads::run, context.pool = &threads;
  fa::Plan plan;
  fa::Status status = fa::plan(params, fa::Device{}, &plan, kernel.empty() ? nullptr : kernel.c_str());
  if (status.ok()) {
    py::gil_scoped_release release;
    status = fa::launch(plan, params, context);
  }
  return result(status);
}

fa::Gradients gradients_of(const py::dict& fields, bool corrupt) {
  fa::Gradients g;
  const std::pair<const char*, TensorView*> tensors[] = {{"d_out", &g.d_out},    {"d_lse", &g.d_lse},     {"d_query", &g.d_query},
                                                         {"d_key", &g.d_key},    {"d_value", &g.d_value}, {"d_bias", &g.d_bias},
                                                         {"d_sinks", &g.d_sinks}};
  for (const auto& [name, t] : tensors) {
    if (fields.contains(name)) *t = view(fields[name].cast<py::array>(), corrupt);
  }
  return g;
}

py::tuple attention_backward(const py::dict& fields, const py::dict& gradients, size_t num_threads, bool corrupt) {
  const StepParams params = params_of(fields, corrupt);
  const fa::Gradients g = gradients_of(gradients, corrupt);
  fa::Threads threads{num_threads};
  fa::ExecutionContext context;
  if (num_threads > 0) context.parallel_for = fa::Threads::run, context.pool = &threads;
  fa::BackwardPlan plan;
  fa::Status status = fa::plan_backward(params, g, fa::Device{}, &plan);
  if (status.ok()) {
    py::gil_scoped_release release;
    status = fa::launch_backward(plan, params, g, context);
  }
  return result(status);
}

/// As attention, but that the plan needs `needed` bytes of workspace and the context has `reserved`.
py::tuple attention_in(const py::dict& fields, size_t needed, size_t reserved) {
  const StepParams params = params_of(fields, false);
  fa::Plan plan;
  if (fa::Status status = fa::plan(params, fa::Device{}, &plan); !status.ok()) return result(status);
  plan.workspace_bytes = needed;
  std::vector<char> memory(reserved);
  fa::ExecutionContext context;
  context.workspace = memory.data();
  context.workspace_bytes = reserved;
  return result(fa::launch(plan, params, context));
}

fa::Device device_of(int compute_capability) {
  if (compute_capability == 0) return {};
  return {fa::DeviceType::kCuda, compute_capability, 108, 163 * 1024};
}

}  // namespace

PYBIND11_MODULE(fa_csrc, m) {
  m.doc() = "fa_core without an adapter. Status is (code, sentence): 0 ok, 1 invalid argument, 2 unsupported.";
  m.def("attention", attention, py::arg("fields"), py::arg("num_threads") = 0, py::arg("corrupt") = false, py::arg("kernel") = "",
        "plan and launch on the CPU; 0 threads: the calling one does it all without a pool");
  m.def("attention_backward", attention_backward, py::arg("fields"), py::arg("gradients"), py::arg("num_threads") = 0,
        py::arg("corrupt") = false, "plan_backward and launch_backward on the CPU; fields have out and lse of attention");
  m.def("attention_in", attention_in, py::arg("fields"), py::arg("needed"), py::arg("reserved"));
  m.def(
      "attention_without_data",
      [](const py::dict& fields, const std::string& name) {
        StepParams params = params_of(fields, false);
        (name == "query" ? params.query : name == "out" ? params.out : params.kv_lengths).data = nullptr;
        fa::Plan plan;
        if (fa::Status status = fa::plan(params, fa::Device{}, &plan); !status.ok()) return result(status);
        return result(fa::launch(plan, params, fa::ExecutionContext{}));
      },
      "attention, but that one tensor has no memory");
  m.def("launch_without_plan",
        [](const py::dict& fields) { return result(fa::launch(fa::Plan{}, params_of(fields, false), fa::ExecutionContext{})); });
  m.def("validate", [](const py::dict& fields) { return result(fa::validate(params_of(fields, false))); });
  m.def(
      "explain",
      [](const py::dict& fields, int compute_capability) {
        return fa::explain(params_of(fields, false), device_of(compute_capability));
      },
      py::arg("fields"), py::arg("compute_capability") = 0);
  m.def(
      "append_kv",
      [](const py::array& past, const py::array& fresh, const py::array& present, size_t num_threads) {
        fa::Threads threads{num_threads};
        fa::ExecutionContext context;
        if (num_threads > 0) context.parallel_for = fa::Threads::run, context.pool = &threads;
        return result(fa::append_kv(view(past, true), view(fresh, true), view(present, true), fa::Device{}, context));
      },
      py::arg("past"), py::arg("fresh"), py::arg("present"), py::arg("num_threads") = 0);
  m.def("overlap", [](const py::array& a, const py::array& b) { return fa::overlap(view(a, true), view(b, true)); });
  m.def("overlaps_itself", [](const py::array& array) { return fa::overlaps_itself(view(array, true)); });
  bind_semantics(m);
}
