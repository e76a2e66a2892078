// A layer of AFW on a CPU without Python between libada2i_cpu and torch: checks, memory, the call, and its node in autograd's graph, as
// ada2i_fast/ops/afw_layer.py and ada2i_fast/cpu/afw_layer.py have them.
#include "common.h"

#include <ATen/ops/zeros_like.h>

namespace ada2i {
namespace {

constexpr int64_t kModalities = 8, kRank = 32, kPer = 13, kParameters = 12;
Function tensor_ring_forward{"ada2i_tensor_ring_forward"}, tensor_ring_backward{"ada2i_tensor_ring_backward"};
PyObject* second_order;

struct Layer {
  int64_t m, rank, rows, dialogues, gated;
  int64_t widths[kModalities], ring[kModalities * (kModalities - 1)];
  double scale, beta, dropout, coefficient[kModalities];
  at::ScalarType dtype, parameters;
  bool with_loss;
};

at::ScalarType accumulator(at::ScalarType t) { return t == at::kDouble ? at::kDouble : at::kFloat; }

void call(const Function& function, const Layer& layer, const Tensor& offsets, const Tensor& seed, void* loss, void* const* tensors) {
  run(function, TensorRing{code(layer.dtype), at::get_num_threads(), layer.m, layer.rows, layer.dialogues, layer.rank, layer.gated,
                           code(layer.parameters), layer.scale, layer.beta, layer.dropout, layer.widths, layer.ring,
                           offsets.const_data_ptr<int64_t>(), address(seed), loss ? layer.coefficient : nullptr, loss, tensors});
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
    call(tensor_ring_forward, layer, offsets, seed, nullptr, p.list);
    return out;
  }
  int64_t at[4 * kModalities];
  Tensor state = empty({places(layer, at)}, at::kByte), loss = empty({}, accumulator(layer.dtype));
  char* base = static_cast<char*>(state.data_ptr());
  for (int64_t i = 0; i < 3 * m; ++i) p.add(base + at[i]);
  for (int64_t i = 11 * m; i < kPer * m; ++i) p.add(tensors[i]);
  for (int64_t i = 3 * m; i < 4 * m; ++i) p.add(base + at[i]);
  call(tensor_ring_forward, layer, offsets, seed, loss.data_ptr(), p.list);
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
  call(tensor_ring_backward, layer, offsets, seed, loss ? grad_loss.data_ptr() : nullptr, p.list);
  for (int64_t i = 0; i < wanted; ++i) found.push_back(part(flat, starts[i], tensors[m + i].sizes()));
  found.resize(kPer * m);
  return found;
}

py::tuple settings(const Layer& layer, const Tensor& seed) {
  py::list ring, coefficient;
  for (int64_t i = 0; i < layer.m * (layer.m - 1); ++i) ring.append(layer.ring[i]);
  for (int64_t j = 0; j < layer.m; ++j) coefficient.append(layer.coefficient[j]);
  return py::make_tuple(ring, layer.scale, layer.beta, layer.dropout, seed_or_none(seed), bool(layer.gated), coefficient);
}

struct AFWLayerBackward : SavingNode {      // saves x and the parameters, offsets, the seed, the state
  Layer layer;

  variable_list apply(variable_list&& grads) override {
    variable_list tensors = unpack();
    const auto last = [&] {
      Tensor t = std::move(tensors.back());
      tensors.pop_back();
      return t;
    };
    const Tensor state = last(), seed = last(), offsets = last();
    if (!at::GradMode::is_enabled()) return backward(layer, tensors, offsets, seed, state, grads);
    py::gil_scoped_acquire gil;
    return ask_python(second_order, tensors, offsets, settings(layer, seed), grads);
  }

  std::string name() const override { return "AFWLayerBackward"; }
};

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
  int64_t* to = layer.ring;
  for (int64_t j = 0; j < layer.m; ++j) {
    const Items others(ring[j]);
    if (others.size() != layer.m - 1) return false;
    for (int64_t i = 0; i < layer.m - 1; ++i, ++to)
      if (!read(others[i], *to) || *to < 0 || *to >= layer.m) return false;
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

// The arguments of ops.afw_layer; (M outputs, loss or None), or None.
py::object afw_layer(py::handle x, py::handle offsets_, py::handle kinds, py::handle ring, py::handle scale, py::handle beta,
                     py::handle dropout, py::handle seed_, py::handle gated_target, py::handle reduction, bool with_loss) {
  Layer layer{};
  variable_list tensors;
  if (!undisturbed() || !take(Items(x), Items(kinds), tensors) || !plain(offsets_.ptr())) return py::none();
  const Tensor& offsets = THPVariable_Unpack(offsets_.ptr());
  if (!describe(tensors, offsets, layer) || !read_ring(Items(ring), layer) || !coefficients(reduction, layer) ||
      !read(scale, layer.scale) || !read(beta, layer.beta) || !read(dropout, layer.dropout) || !(layer.dropout >= 0 && layer.dropout < 1))
    return py::none();
  layer.gated = gated_target.ptr() == Py_True;
  if (!layer.gated && gated_target.ptr() != Py_False) return py::none();
  layer.with_loss = with_loss;
  const bool graph = wants_graph(tensors);
  if (graph && !with_loss) return py::none();
  Tensor seed;
  if (!read_seed(seed_, layer.dropout, seed)) return py::none();

  variable_list out;
  {
    py::gil_scoped_release release;
    out = forward(layer, tensors, offsets, seed);
    Tensor state = with_loss ? out.back() : Tensor();
    if (with_loss) out.pop_back();
    if (graph) {
      auto pointer = make_node<AFWLayerBackward>(tensors);
      auto* node = static_cast<AFWLayerBackward*>(pointer.get());
      node->layer = layer;
      node->saved.reserve(tensors.size() + 3);
      node->save({tensors, {offsets, seed, state}});
      for (auto& t : out) torch::autograd::set_history(t, pointer);
    }
  }
  py::list outputs(layer.m);
  for (int64_t j = 0; j < layer.m; ++j) PyList_SET_ITEM(outputs.ptr(), j, THPVariable_Wrap(std::move(out[j])));
  return py::make_tuple(outputs, with_loss ? py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(out[layer.m]))) : py::none());
}

}  // namespace

Brought bring_afw_layer(py::module& module) {
  module.def("afw_layer", torch::wrap_pybind_function(afw_layer));
  return {{&tensor_ring_forward, &tensor_ring_backward}, {{"afw_layer", &second_order}}};
}

}  // namespace ada2i
