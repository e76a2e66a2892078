// What BalancedAdam (ada2i_fast/optim.py) asks of hundreds of tensors at every step on a CPU, and the library's two passes over them.
#include "common.h"

namespace ada2i_torch {
namespace {

Function measure{"ada2i_balanced_adam_measure"}, update{"ada2i_balanced_adam_update"};

// A dense float tensor, contiguous, and nobody's wrapper.
bool dense(const Tensor& t) {
  return t.defined() && t.key_set() == plain_keys && t.scalar_type() == at::kFloat && t.is_contiguous();
}

// The tensors of a step whose table (optim._Table) still fits.
struct Gathered {
  variable_list params, grads, exp_avg, exp_avg_sq;
  std::vector<void*> pointers;      // of `grads`; then of all four lists
  std::vector<int64_t> sizes;

  Tensor measured() {
    py::gil_scoped_release release;
    Tensor found = empty({int64_t(sizes.size()), 2}, at::kDouble);
    point({&grads});
    run(measure, arguments(nullptr, nullptr, nullptr, found.data_ptr<double>(), 0, 0, 0));
    return found;
  }

  // settings: float64 [T, 6]. numbers: int64 [T]. seed: int64 [2], or None without noise.
  void updated(const Tensor& settings, const Tensor& numbers, const std::optional<Tensor>& seed, double beta1, double beta2, double eps) {
    const int64_t count = sizes.size();
    const auto is = [](const Tensor& t, at::ScalarType dtype) { return t.is_cpu() && t.is_contiguous() && t.scalar_type() == dtype; };
    TORCH_CHECK_VALUE(is(settings, at::kDouble) && has_shape(settings, count, 6) && is(numbers, at::kLong) && has_shape(numbers, count),
                      "settings, numbers: expected float64 [", count, ", 6] and int64 [", count, "] on the CPU");
    TORCH_CHECK_VALUE(!seed || (is(*seed, at::kLong) && seed->numel() == 2), "seed: expected int64 [2] on the CPU");
    py::gil_scoped_release release;
    point({&params, &grads, &exp_avg, &exp_avg_sq});
    run(update, arguments(seed ? seed->const_data_ptr<int64_t>() : nullptr, numbers.const_data_ptr<int64_t>(), settings.const_data_ptr<double>(),
                          nullptr, beta1, beta2, eps));
    for (auto* list : {&params, &exp_avg, &exp_avg_sq})
      for (auto& t : *list) t.unsafeGetTensorImpl()->bump_version();
  }

 private:
  void point(std::initializer_list<const variable_list*> lists) {
    pointers.clear();
    for (const auto* list : lists)
      for (const auto& t : *list) pointers.push_back(t.data_ptr());
  }

  BalancedAdam arguments(const int64_t* seed, const int64_t* numbers, const double* settings, double* measures, double beta1, double beta2,
                         double eps) const {
    return {at::get_num_threads(), int64_t(sizes.size()), beta1, beta2, eps, seed, sizes.data(), numbers, settings, measures, pointers.data()};
  }
};

// groups: lists of parameters. state: of the optimiser. params, steps: of the table. None unless those with a gradient are the table's, all is
// `dense`, and nothing has another size.
py::object gather(py::list groups, py::dict state, py::list params, py::list steps) {
  static PyObject *exp_avg = PyUnicode_InternFromString("exp_avg"), *exp_avg_sq = PyUnicode_InternFromString("exp_avg_sq"),
                  *step = PyUnicode_InternFromString("step");
  if (!undisturbed()) return py::none();
  auto found = std::make_unique<Gathered>();
  const size_t count = params.size();
  for (auto* list : {&found->params, &found->grads, &found->exp_avg, &found->exp_avg_sq}) list->reserve(count);
  found->sizes.reserve(count);
  for (py::handle group : groups) {
    const Items own(group);
    for (int64_t i = 0; i < own.size(); ++i) {
      if (!plain(own[i])) return py::none();
      const Tensor& p = THPVariable_Unpack(own[i]);
      const Tensor& g = p.grad();
      if (!g.defined()) continue;
      const size_t at = found->sizes.size();
      if (at == count || own[i] != PyList_GET_ITEM(params.ptr(), at) || !dense(p) || !dense(g) || g.sizes() != p.sizes()) return py::none();
      PyObject* of = PyDict_GetItemWithError(state.ptr(), own[i]);
      if (!of || !PyDict_Check(of)) {
        PyErr_Clear();
        return py::none();
      }
      if (PyDict_GetItem(of, step) != PyList_GET_ITEM(steps.ptr(), at)) return py::none();
      for (auto [key, list] : {std::pair{exp_avg, &found->exp_avg}, std::pair{exp_avg_sq, &found->exp_avg_sq}}) {
        PyObject* moment = PyDict_GetItem(of, key);
        if (!moment || !plain(moment) || !dense(THPVariable_Unpack(moment)) || THPVariable_Unpack(moment).sizes() != p.sizes()) return py::none();
        list->push_back(THPVariable_Unpack(moment));
      }
      found->params.push_back(p);
      found->grads.push_back(g);
      found->sizes.push_back(p.numel());
    }
  }
  if (found->sizes.size() != count) return py::none();
  return py::cast(std::move(found));
}

}  // namespace

Brought bring_balanced_adam(py::module& module) {
  py::class_<Gathered>(module, "Gathered").def("measure", &Gathered::measured).def("update", &Gathered::updated);
  module.def("balanced_adam", torch::wrap_pybind_function(gather));
  return {{&measure, &update}, {}};
}

}  // namespace ada2i_torch
