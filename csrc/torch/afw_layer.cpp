// A layer of AFW on a CPU without Python between libada2i_cpu and torch: checks, memory, the call, and its node in autograd's graph.
//
// It does what ada2i_fast/ops/afw_layer.py and ada2i_fast/cpu/afw_layer.py do for plain tensors, and declines everything else: then Python
// decides, and words the errors. Built against one version of torch and of Python, and left out where another runs.
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/zeros_like.h>
#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "../cpu/ada2i_cpu.h"

namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

constexpr int64_t kModalities = 8, kRank = 32, kPer = 13, kParameters = 12;
using Call = int (*)(const void*, int64_t);
Call tensor_ring_forward, tensor_ring_backward;
PyTypeObject* parameter_class;
PyObject* second_order;
c10::DispatchKeySet plain_keys;

struct Layer {
  int64_t m, rank, rows, dialogues, gated;
  int64_t widths[kModalities], ring[kModalities * (kModalities - 1)];
  double scale, beta, dropout, coefficient[kModalities];
  at::ScalarType dtype, parameters;
  bool with_loss;
};

at::ScalarType accumulator(at::ScalarType t) { return t == at::kDouble ? at::kDouble : at::kFloat; }

int64_t code(at::ScalarType t) {
  return t == at::kFloat ? ADA2I_FLOAT32 : t == at::kDouble ? ADA2I_FLOAT64 : t == at::kBFloat16 ? ADA2I_BFLOAT16 : ADA2I_FLOAT16;
}

// A strided CPU tensor that nobody wraps, and no inference or fake tensor.
bool plain(PyObject* object) {
  if (Py_TYPE(object) != parameter_class && !THPVariable_CheckExact(object)) return false;
  const Tensor& t = THPVariable_Unpack(object);
  return t.key_set() == plain_keys && t.is_contiguous() && !t._fw_grad(0).defined();
}

void run(Call function, const char* name, const Layer& layer, const Tensor& offsets, const Tensor& seed, void* loss, void* const* tensors) {
  RECORD_USER_SCOPE(name);
  TensorRing args{code(layer.dtype), at::get_num_threads(), layer.m, layer.rows, layer.dialogues, layer.rank, layer.gated,
                  code(layer.parameters), layer.scale, layer.beta, layer.dropout, layer.widths, layer.ring, offsets.const_data_ptr<int64_t>(),
                  seed.defined() ? seed.const_data_ptr<int64_t>() : nullptr, loss ? layer.coefficient : nullptr, loss, tensors};
  const int status = function(&args, sizeof args);
  TORCH_CHECK(status != 2, name, ": libada2i_cpu.so was built from other sources: build it again (pip install -e .)");
  if (status) throw std::bad_alloc();
}

// Where in the state each modality's projections, means, attentions and signs begin, kind by kind; returns where it ends. In bytes.
int64_t places(const Layer& layer, int64_t* at) {
  const int64_t precise = c10::elementSize(accumulator(layer.dtype)), size = c10::elementSize(layer.dtype);
  int64_t end = 0;
  for (int kind = 0; kind < 4; ++kind)
    for (int64_t j = 0; j < layer.m; ++j) {
      *at++ = end;
      const int64_t bytes[] = {4 * layer.rank * layer.rows * precise, layer.dialogues * layer.rank * layer.rank * precise,
                               layer.rows * layer.widths[j] * size, layer.rows * layer.widths[j]};
      end += (bytes[kind] + 63) / 64 * 64;
    }
  return end;
}

struct Pointers {
  void* list[kModalities * 40];
  int64_t count = 0;
  void add(const Tensor& t) { list[count++] = t.data_ptr(); }
  void add(void* p) { list[count++] = p; }
  void nulls(int64_t n) { while (n--) list[count++] = nullptr; }
};

Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) { return at::detail::empty_cpu(sizes, dtype); }

// M outputs; with a loss that and the state for backward. tensors: x and the parameters, 13M.
variable_list forward(const Layer& layer, const variable_list& tensors, const Tensor& offsets, const Tensor& seed) {
  const int64_t m = layer.m;
  variable_list out;
  out.reserve(m + 2);
  for (int64_t j = 0; j < m; ++j) out.push_back(empty({layer.rows, layer.widths[j]}, layer.dtype));
  Pointers p;
  for (int64_t i = 0; i < 11 * m; ++i) p.add(tensors[i]);
  for (int64_t j = 0; j < m; ++j) p.add(out[j]);
  p.nulls(m);
  if (!layer.with_loss) {
    p.nulls(3 * m);
    run(tensor_ring_forward, "ada2i_tensor_ring_forward", layer, offsets, seed, nullptr, p.list);
    return out;
  }
  int64_t at[4 * kModalities];
  Tensor state = empty({places(layer, at)}, at::kByte), loss = empty({}, accumulator(layer.dtype));
  char* base = static_cast<char*>(state.data_ptr());
  for (int64_t i = 0; i < 3 * m; ++i) p.add(base + at[i]);
  for (int64_t i = 11 * m; i < kPer * m; ++i) p.add(tensors[i]);
  for (int64_t i = 3 * m; i < 4 * m; ++i) p.add(base + at[i]);
  run(tensor_ring_forward, "ada2i_tensor_ring_forward", layer, offsets, seed, loss.data_ptr(), p.list);
  out.push_back(std::move(loss));
  out.push_back(std::move(state));
  return out;
}

// A part of a tensor's memory, as a tensor.
Tensor part(const Tensor& flat, int64_t start, at::IntArrayRef sizes) {
  auto impl = c10::make_intrusive<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(flat.storage()), flat.key_set(), flat.dtype());
  impl->set_storage_offset(start);
  impl->set_sizes_contiguous(sizes);
  return Tensor(std::move(impl));
}

variable_list backward(const Layer& layer, const variable_list& tensors, const Tensor& offsets, const Tensor& seed, const Tensor& state,
                       const variable_list& grads) {
  const int64_t m = layer.m;
  const bool loss = grads[m].defined();
  variable_list found;
  found.reserve(kPer * m);
  variable_list given;
  for (int64_t j = 0; j < m; ++j) {
    found.push_back(empty({layer.rows, layer.widths[j]}, layer.dtype));
    given.push_back(grads[j].defined() ? grads[j].contiguous() : at::zeros_like(tensors[j]));
  }
  // The parameters' gradients lie in one tensor, in the parameters' order.
  int64_t starts[kParameters * kModalities + 1], end = 0;
  const int64_t wanted = (loss ? kParameters : 10) * m;
  for (int64_t i = 0; i < wanted; ++i) {
    starts[i] = end;
    end += tensors[m + i].numel();
  }
  Tensor flat = empty({end}, layer.parameters);
  char* to = static_cast<char*>(flat.data_ptr());
  const int64_t size = c10::elementSize(layer.parameters);
  int64_t at[4 * kModalities];
  places(layer, at);
  char* base = static_cast<char*>(state.data_ptr());
  Pointers p;
  for (int64_t i = 0; i < 5 * m; ++i) p.add(tensors[i]);
  for (int64_t i = 9 * m; i < 10 * m; ++i) p.add(tensors[i]);
  for (int64_t i = 0; i < 3 * m; ++i) p.add(base + at[i]);
  for (int64_t j = 0; j < m; ++j) p.add(given[j]);
  p.nulls(m);
  for (int64_t j = 0; j < m; ++j) p.add(found[j]);
  for (int64_t i = 0; i < 8 * m; i += 4) p.add(to + starts[i] * size);
  for (int64_t i = 8 * m; i < 10 * m; ++i) p.add(to + starts[i] * size);
  Tensor grad_loss;
  if (loss) {
    grad_loss = grads[m].contiguous();
    for (int64_t i = 11 * m; i < 12 * m; ++i) p.add(tensors[i]);
    for (int64_t i = 3 * m; i < 4 * m; ++i) p.add(base + at[i]);
    for (int64_t i = 10 * m; i < 12 * m; ++i) p.add(to + starts[i] * size);
  }
  run(tensor_ring_backward, "ada2i_tensor_ring_backward", layer, offsets, seed, loss ? grad_loss.data_ptr() : nullptr, p.list);
  for (int64_t i = 0; i < wanted; ++i) found.push_back(part(flat, starts[i], tensors[m + i].sizes()));
  found.resize(kPer * m);
  return found;
}

py::tuple settings(const Layer& layer, const Tensor& seed) {
  py::list ring, coefficient;
  for (int64_t i = 0; i < layer.m * (layer.m - 1); ++i) ring.append(layer.ring[i]);
  for (int64_t j = 0; j < layer.m; ++j) coefficient.append(layer.coefficient[j]);
  return py::make_tuple(ring, layer.scale, layer.beta, layer.dropout, seed.defined() ? py::cast(seed) : py::none(), bool(layer.gated), coefficient);
}

struct AFWLayerBackward : torch::autograd::Node {
  Layer layer;
  std::vector<SavedVariable> saved;      // x and the parameters, offsets, the seed, the state

  variable_list apply(variable_list&& grads) override {
    variable_list tensors;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tensors.reserve(saved.size());
      for (auto& s : saved) tensors.push_back(s.unpack());
    }
    const auto last = [&] {
      Tensor t = std::move(tensors.back());
      tensors.pop_back();
      return t;
    };
    const Tensor state = last(), seed = last(), offsets = last();
    if (!at::GradMode::is_enabled()) return backward(layer, tensors, offsets, seed, state, grads);
    // create_graph=True: the library has no derivative, the algebra has all.
    py::gil_scoped_acquire gil;
    try {
      py::object result = py::reinterpret_borrow<py::object>(second_order)(tensors, offsets, settings(layer, seed), grads);
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

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& s : saved) s.reset_data();
  }

  std::string name() const override { return "AFWLayerBackward"; }
};

template <typename Pointer>
Pointer make_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>)
    return Pointer(new AFWLayerBackward, [](auto* node) { deleteNode(node); });
  else
    return c10::make_intrusive<AFWLayerBackward>();
}
using NodePointer = std::decay_t<decltype(std::declval<Tensor>().grad_fn())>;

// A list or a tuple, item by item; anything else has size -1.
struct Items {
  PyObject* object;
  explicit Items(py::handle h) : object(h.ptr()) {}
  int64_t size() const { return PyList_Check(object) || PyTuple_Check(object) ? PySequence_Fast_GET_SIZE(object) : -1; }
  PyObject* operator[](int64_t i) const { return PySequence_Fast_GET_ITEM(object, i); }
};

bool read_numbers(py::handle scale, py::handle beta, py::handle dropout, py::handle gated, Layer& layer) {
  layer.scale = PyFloat_AsDouble(scale.ptr());
  if (!PyErr_Occurred()) layer.beta = PyFloat_AsDouble(beta.ptr());
  if (!PyErr_Occurred()) layer.dropout = PyFloat_AsDouble(dropout.ptr());
  if (!PyErr_Occurred()) layer.gated = PyObject_IsTrue(gated.ptr());
  const bool failed = PyErr_Occurred();
  PyErr_Clear();
  return !failed && layer.dropout >= 0 && layer.dropout < 1;
}

// x and the parameters, 13M tensors, if all are `plain`.
bool take(const Items& x, const Items& kinds, variable_list& tensors) {
  constexpr int64_t counts[] = {4, 4, 1, 1, 1, 1};
  const int64_t m = x.size();
  if (m < 1 || m > kModalities || kinds.size() != 6) return false;
  tensors.reserve(kPer * m);
  for (int k = -1; k < 6; ++k) {
    const Items items = k < 0 ? x : Items(kinds[k]);
    if (k >= 0 && items.size() != counts[k] * m) return false;
    for (int64_t i = 0; i < items.size(); ++i) {
      if (!plain(items[i])) return false;
      tensors.push_back(THPVariable_Unpack(items[i]));
    }
  }
  return true;
}

bool has_shape(const Tensor& t, int64_t first, int64_t second) {      // second: 0 for a vector
  return t.dim() == (second ? 2 : 1) && t.size(0) == first && (!second || t.size(1) == second);
}

// Sizes and dtypes into `layer`, if they fit each other and the library.
bool describe(const variable_list& tensors, const Tensor& offsets, Layer& layer) {
  const int64_t m = layer.m = tensors.size() / kPer;
  layer.dtype = tensors[0].scalar_type();
  layer.parameters = tensors[m].scalar_type();
  const bool half = layer.dtype == at::kBFloat16 || layer.dtype == at::kHalf;
  if (!half && layer.dtype != at::kFloat && layer.dtype != at::kDouble) return false;
  if (layer.parameters != layer.dtype && !(half && layer.parameters == at::kFloat)) return false;
  if (tensors[0].dim() != 2 || tensors[5 * m].dim() != 1) return false;
  const int64_t rows = layer.rows = tensors[0].size(0), rank = layer.rank = tensors[5 * m].size(0);
  if (rank < 1 || rank > kRank) return false;
  for (int64_t j = 0; j < m; ++j) {
    const int64_t width = layer.widths[j] = tensors[j].dim() == 2 ? tensors[j].size(1) : 0;
    if (width < 1 || tensors[j].size(0) != rows || tensors[j].scalar_type() != layer.dtype) return false;
    const Tensor* own = &tensors[m];
    for (int64_t i = 0; i < 4; ++i)
      if (!has_shape(own[4 * j + i], rank, width) || !has_shape(own[4 * m + 4 * j + i], rank, 0)) return false;
    if (!has_shape(own[8 * m + j], width, rank * rank) || !has_shape(own[9 * m + j], width, 0) ||
        !has_shape(own[10 * m + j], width, width) || !has_shape(own[11 * m + j], width, 0))
      return false;
  }
  for (int64_t i = m; i < kPer * m; ++i)
    if (tensors[i].scalar_type() != layer.parameters) return false;

  if (offsets.scalar_type() != at::kLong || offsets.dim() != 1 || offsets.numel() < 1) return false;
  const int64_t* at = offsets.const_data_ptr<int64_t>();
  layer.dialogues = offsets.numel() - 1;
  return at[0] == 0 && at[layer.dialogues] == rows && std::is_sorted(at, at + layer.dialogues + 1);
}

bool read_ring(const Items& ring, Layer& layer) {
  if (ring.size() != layer.m) return false;
  for (int64_t j = 0; j < layer.m; ++j) {
    const Items others(ring[j]);
    if (others.size() != layer.m - 1) return false;
    for (int64_t i = 0; i < layer.m - 1; ++i) {
      const long l = PyLong_Check(others[i]) ? PyLong_AsLong(others[i]) : -1;
      if (l < 0 || l >= layer.m) {
        PyErr_Clear();
        return false;
      }
      layer.ring[j * (layer.m - 1) + i] = l;
    }
  }
  return true;
}

bool coefficients(py::handle reduction, Layer& layer) {
  const auto is = [&](const char* name) { return PyUnicode_Check(reduction.ptr()) && !PyUnicode_CompareWithASCIIString(reduction.ptr(), name); };
  const bool mean = is("mean");
  if (!mean && !is("sum")) return false;
  int64_t all = 0;
  for (int64_t j = 0; j < layer.m; ++j) all += layer.rows * layer.widths[j];
  for (int64_t j = 0; j < layer.m; ++j) {
    const int64_t n = mean ? all : layer.rows * layer.widths[j];
    layer.coefficient[j] = n ? 1.0 / n : 0.0;
  }
  return true;
}

// Whether nobody wants to see what happens, and no other backend is asked for.
bool undisturbed() {
  const char* forced = std::getenv("ADA2I_FAST_BACKEND");
  return (!forced || !*forced || !std::strcmp(forced, "auto") || !std::strcmp(forced, "cpu")) &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
         !c10::impl::tls_local_dispatch_key_set().included_.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// The arguments of ops.afw_layer; (M outputs, loss or None), or None.
py::object afw_layer(py::handle x, py::handle offsets_, py::handle kinds, py::handle ring, py::handle scale, py::handle beta,
                     py::handle dropout, py::handle seed_, py::handle gated_target, py::handle reduction, bool with_loss) {
  Layer layer{};
  variable_list tensors;
  if (!undisturbed() || !take(Items(x), Items(kinds), tensors) || !plain(offsets_.ptr())) return py::none();
  const Tensor& offsets = THPVariable_Unpack(offsets_.ptr());
  if (!describe(tensors, offsets, layer) || !read_ring(Items(ring), layer) || !coefficients(reduction, layer) ||
      !read_numbers(scale, beta, dropout, gated_target, layer))
    return py::none();
  layer.with_loss = with_loss;
  const bool graph = at::GradMode::is_enabled() &&
                     std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.requires_grad(); });
  if (graph && !with_loss) return py::none();
  Tensor seed;
  if (layer.dropout > 0 && seed_.is_none()) {
    seed = at::randint(std::numeric_limits<int64_t>::max(), {1}, at::TensorOptions().dtype(at::kLong));
  } else if (layer.dropout > 0) {
    if (!plain(seed_.ptr())) return py::none();
    seed = THPVariable_Unpack(seed_.ptr());
    if (seed.scalar_type() != at::kLong || seed.numel() != 1) return py::none();
  }

  variable_list out;
  {
    py::gil_scoped_release release;
    out = forward(layer, tensors, offsets, seed);
    Tensor state = with_loss ? out.back() : Tensor();
    if (with_loss) out.pop_back();
    if (graph) {
      auto pointer = make_node<NodePointer>();
      auto* node = static_cast<AFWLayerBackward*>(pointer.get());
      node->set_next_edges(torch::autograd::collect_next_edges(tensors));
      node->layer = layer;
      node->saved.reserve(tensors.size() + 3);
      for (auto& t : tensors) node->saved.emplace_back(t, false);
      for (auto& t : {offsets, seed, state}) node->saved.emplace_back(t, false);
      for (auto& t : out) torch::autograd::set_history(t, pointer);
    }
  }
  py::list outputs(layer.m);
  for (int64_t j = 0; j < layer.m; ++j) PyList_SET_ITEM(outputs.ptr(), j, THPVariable_Wrap(std::move(out[j])));
  return py::make_tuple(outputs, with_loss ? py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(out[layer.m]))) : py::none());
}

}  // namespace

PYBIND11_MODULE(ada2i_torch, module) {
  module.attr("ABI_VERSION") = 1;
  // Addresses of the library's functions; torch.nn.Parameter; what calculates gradients with a graph of their own.
  module.def("use", [](uintptr_t forward, uintptr_t backward, py::object parameter, py::object second) {
    tensor_ring_forward = reinterpret_cast<Call>(forward);
    tensor_ring_backward = reinterpret_cast<Call>(backward);
    parameter_class = reinterpret_cast<PyTypeObject*>(parameter.release().ptr());
    second_order = second.release().ptr();
    const c10::InferenceMode off(false);          // whose tensors are others
    plain_keys = at::detail::empty_cpu({0}, at::kFloat).key_set();
  });
  module.def("afw_layer", torch::wrap_pybind_function(afw_layer));
}
