// What the nodes of this folder share: a library's functions, tensors as Python hands them over, and nodes of autograd's graph.
//
// Each does what a file of ada2i_fast/ops does for plain tensors, and declines everything else: then Python decides, and words the errors.
// Built against one version of torch and of Python, and left out where another runs.
#pragma once
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/randint.h>
#include <ATen/record_function.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "../cpu/ada2i_cpu.h"

namespace ada2i_torch {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// ---------------------------------------------------------------------------------------------------------------- the library

struct Function {
  const char* name;
  int (*call)(const void*, int64_t) = nullptr;
};

template <class Arguments> void run(const Function& function, const Arguments& args) {
  RECORD_USER_SCOPE(function.name);
  const int status = function.call(&args, sizeof args);
  TORCH_CHECK(status != 2, function.name, ": libada2i_cpu.so was built from other sources: build it again (pip install -e .)");
  if (status) throw std::bad_alloc();
}

inline int64_t code(at::ScalarType t) {
  return t == at::kFloat ? ADA2I_FLOAT32 : t == at::kDouble ? ADA2I_FLOAT64 : t == at::kBFloat16 ? ADA2I_BFLOAT16 : ADA2I_FLOAT16;
}

inline Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) { return at::detail::empty_cpu(sizes, dtype); }

// ---------------------------------------------------------------------------------------------------------- what Python gives

// Set by `use` (module.cpp).
inline PyTypeObject* parameter_class;
inline c10::DispatchKeySet plain_keys;

inline bool is_tensor(PyObject* object) { return Py_TYPE(object) == parameter_class || THPVariable_CheckExact(object); }

// A contiguous tensor, by its keys on a CPU, that nobody wraps, and no inference or fake tensor.
inline bool plain(PyObject* object, c10::DispatchKeySet keys = plain_keys) {
  if (!is_tensor(object)) return false;
  const Tensor& t = THPVariable_Unpack(object);
  return t.key_set() == keys && t.is_contiguous() && !t._fw_grad(0).defined();
}

// A list or a tuple, item by item; anything else has size -1.
struct Items {
  PyObject* object;
  explicit Items(py::handle h) : object(h.ptr()) {}
  int64_t size() const { return PyList_Check(object) || PyTuple_Check(object) ? PySequence_Fast_GET_SIZE(object) : -1; }
  PyObject* operator[](int64_t i) const { return PySequence_Fast_GET_ITEM(object, i); }
};

// Number by number; false, without an error in Python, where one is none.
inline bool read(py::handle h, double& number) {
  number = PyFloat_AsDouble(h.ptr());
  const bool failed = PyErr_Occurred();
  PyErr_Clear();
  return !failed;
}

inline bool read(py::handle h, int64_t& number) {
  number = PyLong_Check(h.ptr()) ? PyLong_AsLongLong(h.ptr()) : -1;
  const bool failed = !PyLong_Check(h.ptr()) || PyErr_Occurred();
  PyErr_Clear();
  return !failed;
}

inline bool has_shape(const Tensor& t, int64_t first, int64_t second = 0) {      // second: 0 for a vector
  return t.dim() == (second ? 2 : 1) && t.size(0) == first && (!second || t.size(1) == second);
}

// Whether nobody wants to see what happens,
inline bool unwatched() {
  return !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
         !c10::impl::tls_local_dispatch_key_set().included_.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}
// and no backend but the CPU's is asked for.
inline bool undisturbed() {
  const char* forced = std::getenv("ADA2I_FAST_BACKEND");
  return (!forced || !*forced || !std::strcmp(forced, "auto") || !std::strcmp(forced, "cpu")) && unwatched();
}

inline bool wants_graph(const variable_list& tensors) {
  return at::GradMode::is_enabled() && std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.requires_grad(); });
}

// With dropout the seed that is given, or, for None, one from torch's generator; false where it is no seed on the device of `like`.
inline bool read_seed(py::handle given, double dropout, const Tensor& like, Tensor& seed) {
  if (dropout == 0) return true;
  if (given.is_none()) {
    seed = at::randint(std::numeric_limits<int64_t>::max(), {1}, like.options().dtype(at::kLong));
    return true;
  }
  if (!plain(given.ptr(), like.key_set())) return false;
  seed = THPVariable_Unpack(given.ptr());
  return seed.scalar_type() == at::kLong && seed.numel() == 1 && seed.device() == like.device();
}

inline const int64_t* address(const Tensor& seed) { return seed.defined() ? seed.const_data_ptr<int64_t>() : nullptr; }

// --------------------------------------------------------------------------------------------------------------------- nodes

struct SavingNode : torch::autograd::Node {
  std::vector<SavedVariable> saved;

  void save(std::initializer_list<at::ArrayRef<Tensor>> lists) {
    for (const auto& list : lists)
      for (const auto& t : list) saved.emplace_back(t, false);
  }

  variable_list unpack() {
    std::lock_guard<std::mutex> lock(mutex_);
    variable_list tensors;
    tensors.reserve(saved.size());
    for (auto& s : saved) tensors.push_back(s.unpack());
    return tensors;
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& s : saved) s.reset_data();
  }
};

using NodePointer = std::decay_t<decltype(std::declval<Tensor>().grad_fn())>;

// Of a class derived from Node; autograd's pointers were shared_ptr before they were intrusive.
template <class T> NodePointer make_node(const variable_list& inputs) {
  NodePointer pointer;
  if constexpr (std::is_same_v<NodePointer, std::shared_ptr<torch::autograd::Node>>)
    pointer = NodePointer(new T, [](auto* node) { deleteNode(node); });
  else
    pointer = c10::make_intrusive<T>();
  pointer->set_next_edges(torch::autograd::collect_next_edges(inputs));
  return pointer;
}

// Gradients by a function of Python's, for create_graph=True: the library has no derivative, plain PyTorch has all.
template <class... Arguments> variable_list ask_python(PyObject* function, Arguments&&... args) {
  py::gil_scoped_acquire gil;
  try {
    py::object result = py::reinterpret_borrow<py::object>(function)(std::forward<Arguments>(args)...);
    variable_list found;
    for (auto item : result) found.push_back(item.is_none() ? Tensor() : py::cast<Tensor>(item));
    return found;
  } catch (py::error_already_set& error) {      // autograd hands on torch's kind alone as it is
    error.restore();
    python_error own;
    own.persist();
    throw own;
  }
}

inline py::object seed_or_none(const Tensor& seed) { return seed.defined() ? py::cast(seed) : py::none(); }

// ------------------------------------------------------------------------------------------- what a file brings, for module.cpp

struct Brought {
  std::vector<Function*> functions;                              // of the library, to be found
  std::vector<std::pair<const char*, PyObject**>> callbacks;     // functions of Python's, by name
};

Brought bring_afw_layer(py::module& module);
Brought bring_encoder_layers(py::module& module);
Brought bring_balanced_adam(py::module& module);

}  // namespace ada2i_torch
